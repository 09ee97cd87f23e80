"""Peers beside the slow references of tests/oracles: on which blocks do their values differ?

    python compare.py make BLOCKS.npz             blocks of every kind and size, for `run_PEER.py values`
    python compare.py show BLOCKS.npz PEER.npz    a row per format: percent of blocks whose values are equal, by kind;
                                                 ~ before those equal within 1e-6; in brackets those of equal scale

Needs numpy and ml_dtypes. A nan equals a nan, and 0 equals -0.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[2] / "tests"))
from oracles import block_formats, codebooks

SIZES = {8: "bfp16", 16: "nvfp4, mx6, mx9", 32: "mx", 64: "codebooks"}
COUNT, OTHERS = 391 * 256, 79 * 256  # torchao's NF4 wants whole runs of 256 scales


def make(path: str) -> None:
    np.savez(
        path,
        **{
            f"{kind}-{size}": block_formats.make_blocks(kind, 7, COUNT if kind == "gaussian" else OTHERS, size)
            for size in SIZES
            for kind in block_formats.KINDS
        },
    )


def reference(name: str, x: np.ndarray, outer: Any = None) -> tuple[np.ndarray, np.ndarray | None] | None:
    """Values and scale codes of a format by its name, where there is a reference for it."""
    name = "mxfp4(floor)" if name == "MXFP4" else name
    if match := re.fullmatch(r"mx(?:fp\d_?|)(\w*)\((\w+)\)", name):
        element = {"": "e2m1", "int8": "int8"}.get(match[1], match[1])
        found = block_formats.mx(x, element, match[2])
    elif name == "nvfp4":
        found = block_formats.nvfp4(x, None if outer is None else np.float32(outer.item()))
    elif name == "bfp16":
        found = block_formats.bfp(x)
    elif name in ("mx6", "mx9"):
        found = block_formats.microexponent(x, {"mx6": 5, "mx9": 8}[name])
    elif name in ("nf4 group=64", "fp4 group=64"):
        return codebooks.quantize(x, name[:3])[2], None
    else:
        return None
    return found.values, found.scale


def show(blocks: str, peer: str) -> None:
    given, theirs = np.load(blocks), np.load(peer)
    names = sorted({key.split("|")[0] for key in theirs})
    print("| format | " + " | ".join(block_formats.KINDS) + " |\n|" + "---|" * (len(block_formats.KINDS) + 1))
    for name in names:
        cells = []
        for kind in block_formats.KINDS:
            values = theirs[f"{name}|{kind}"]
            x = given[f"{kind}-{values.shape[-1]}"]
            with np.errstate(all="ignore"):
                ours = reference(name, x, theirs.get(f"{name}|{kind}|outer"))
            cells.append("" if ours is None else share(values, theirs.get(f"{name}|{kind}|scale"), *ours))
        if any(cells):
            print(f"| {name} | " + " | ".join(cells) + " |")


def share(values: Any, scale: Any, our_values: Any, our_scale: Any) -> str:
    both_nan = np.isnan(values) & np.isnan(our_values)
    equal = np.mean(np.all((values == our_values) | both_nan, axis=-1))
    with np.errstate(all="ignore"):
        close = np.mean(np.all(np.isclose(values, our_values, rtol=1e-6, atol=0) | both_nan, axis=-1))
    text = f"{100 * equal:.3f}" + (f" ~{100 * close:.3f}" if close > equal else "")
    return text if scale is None or our_scale is None else f"{text} ({100 * np.mean(scale == our_scale):.3f})"


if __name__ == "__main__":
    if sys.argv[1:2] == ["make"] and len(sys.argv) == 3:
        make(sys.argv[2])
    elif sys.argv[1:2] == ["show"] and len(sys.argv) == 4:
        show(sys.argv[2], sys.argv[3])
    else:
        sys.exit(__doc__)
