"""What the peer scripts share: they read blocks and write values, or time themselves. Needs numpy only.

python run_PEER.py values IN.npz OUT.npz     arrays `KIND-SIZE` [count, SIZE] in; `FORMAT|KIND` values (and
                                             `…|scale` codes, `…|outer` scale) out, for every format whose block is SIZE
python run_PEER.py speed [--formats A,B]     JSON: GB/s of float32 input, best of some rounds, warm
"""

from __future__ import annotations

import argparse
import ctypes
import importlib.metadata
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Format:
    """One format of a peer, for arrays whose last axis is a whole number of blocks.

    `encode` takes float32 values to whatever the peer stores, `decode` that to float32 values. With `decode` None,
    `encode` rounds and gives values at once. `scale` reads the codes of the blocks' scales, uint8 [count]; `outer` the
    float32 global scale where there is one.
    """

    block: int
    encode: Callable[[Any], Any]
    decode: Callable[[Any], Any] | None
    scale: Callable[[Any], Any] | None = None
    outer: Callable[[Any], Any] | None = None


def main(package: str, formats: dict[str, Format], *, torch: bool = True) -> None:
    """The command line of a peer script; `torch` says whether it takes tensors or arrays."""
    parser = argparse.ArgumentParser(description=f"{package}: values of blocks, and speed")
    commands = parser.add_subparsers(dest="command", required=True)
    values = commands.add_parser("values")
    values.add_argument("source")
    values.add_argument("target")
    speed = commands.add_parser("speed")
    speed.add_argument("--formats", help="comma-separated; all where left out")
    speed.add_argument("--size", type=int, default=4096)
    speed.add_argument("--threads", type=int, default=2)
    speed.add_argument("--rounds", type=int, default=7)
    speed.add_argument("--compile", action="store_true", help="through torch.compile")
    speed.add_argument("--fresh-memory", action="store_true", help="malloc as it comes: each result in new pages")
    options = parser.parse_args()
    if options.command == "values":
        write_values(formats, options.source, options.target, torch)
        return
    names = options.formats.split(",") if options.formats else list(formats)
    if not options.fresh_memory:
        keep_memory()
    if torch:
        import torch as pytorch

        pytorch.set_num_threads(options.threads)
    x = np.random.default_rng(0).standard_normal((options.size, options.size), dtype=np.float32)
    found: dict[str, Any] = {"package": package, "version": importlib.metadata.version(package)}
    found |= {"threads": options.threads if torch else 1, "compiled": options.compile, "load": os.getloadavg()[0]}
    found["fresh_memory"] = options.fresh_memory
    found["formats"] = {n: measure(formats[n], _given(x, torch), options.rounds, options.compile) for n in names}
    print(json.dumps(found, indent=1))


def keep_memory() -> None:
    """Make glibc's malloc keep what it frees: new pages for each result make whole-tensor code up to 4× slower."""
    libc = ctypes.CDLL(None)
    libc.mallopt(-4, 0)  # M_MMAP_MAX: nothing in mappings of its own
    libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: hardly ever given back


def write_values(formats: dict[str, Format], source: str, target: str, torch: bool) -> None:
    found = {}
    for key, x in np.load(source).items():
        kind, size = key.split("-")
        for name, form in formats.items():
            if form.block != int(size):
                continue
            kept = form.encode(_given(x.copy(), torch))
            found[f"{name}|{kind}"] = np.asarray(kept if form.decode is None else form.decode(kept), dtype=np.float32)
            if form.scale is not None:
                found[f"{name}|{kind}|scale"] = np.asarray(form.scale(kept)).reshape(-1)
            if form.outer is not None:
                found[f"{name}|{kind}|outer"] = np.asarray(form.outer(kept), dtype=np.float32)
    np.savez(target, **found)


def measure(form: Format, x: Any, rounds: int, compiled: bool) -> dict[str, float]:
    """GB/s of float32 input, by the clock and per second of one core; `values…` where a peer rounds without storing."""
    encode, decode = form.encode, form.decode
    if compiled:
        import torch

        torch._dynamo.reset()
        encode, decode = torch.compile(encode), None if decode is None else torch.compile(decode)
    kept = encode(x)
    found = {("encode" if decode else "values"): _best(lambda: encode(x), rounds)}
    if decode is not None:
        found["decode"] = _best(lambda: decode(kept), rounds)
    rates = {}
    for part, (wall, core) in found.items():
        rates |= {f"{part}_gbs": round(x.nbytes / 1e9 / wall, 3), f"{part}_core_gbs": round(x.nbytes / 1e9 / core, 3)}
    return rates


def _best(body: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The least wall seconds and the least processor seconds (of all threads) of some rounds; the first one warms."""
    walls, cores = [], []
    for _ in range(rounds + 1):
        wall, core = time.perf_counter(), time.process_time()
        body()
        walls.append(time.perf_counter() - wall)
        cores.append(time.process_time() - core)
    return min(walls[1:]), min(cores[1:])


def _given(x: Any, torch: bool) -> Any:
    if not torch:
        return x
    import torch as pytorch

    return pytorch.from_numpy(x)
