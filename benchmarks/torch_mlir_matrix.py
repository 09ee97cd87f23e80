"""Embedded models and tiny ones of four families through both packings and both kinds of shards, in iree-runtime.

python benchmarks/torch_mlir_matrix.py [--models llama,opt] [--model DIRECTORY]
    [--cases unpacked/layers:2] [--write]

Each artifact is compared with its Program at lengths 1, 2, 7 and 64 and on 32 greedy tokens. About a minute a row.
With `--cases`, rows of other cases and models that the table in results/ has are kept.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from common import RESULTS, publish

import qcompile
from qcompile.artifact import export_program
from qcompile.backends.torch_mlir import TorchMlirBackend
from qcompile.errors import QCompileError
from qcompile.generate import ProgramStepper, generate
from qcompile.zoo import NAMES, path

CASES = (
    ("packed", "none"),
    ("packed", "layers:2"),
    ("packed", "tensor:2"),
    ("unpacked", "none"),
    ("unpacked", "layers:2"),
    ("unpacked", "tensor:2"),
)
RECIPE = {"weights": "int4 sym group=32"}
LENGTHS = (1, 2, 7, 64)


def families() -> dict[str, Any]:
    """Tiny random models, by name."""
    import transformers as hf

    common: dict[str, Any] = {"vocab_size": 320, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    llama: dict[str, Any] = {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 2}
    llama |= {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 256}
    kinds = ["sliding_attention", "full_attention"]
    return {
        "qwen3": hf.Qwen3Config(head_dim=16, **llama, **common),
        "gemma3": hf.Gemma3TextConfig(head_dim=16, sliding_window=16, layer_types=kinds, **llama, **common),
        "phi3": hf.Phi3Config(**llama, **common),
        "gpt2": hf.GPT2Config(n_embd=64, n_layer=2, n_head=4, n_positions=256, **common),
    }


def models(names: list[str], extra: list[Path]) -> Iterator[tuple[str, Any]]:
    """(name, what qcompile.capture takes)."""
    from transformers import AutoModelForCausalLM

    configs = families()
    for name in names:
        if name in NAMES:
            yield name, path(name)
        else:
            torch.manual_seed(0)
            yield name, AutoModelForCausalLM.from_config(configs[name]).eval()
    yield from ((directory.name, directory) for directory in extra)


def measure(name: str, program: Any, packing: Any, shards: str, folder: Path) -> dict[str, object]:
    """One row."""
    out = folder / "artifact"
    shutil.rmtree(out, ignore_errors=True)
    start = time.perf_counter()
    row: dict[str, object] = {"model": name, "packing": packing, "shards": shards}
    try:
        artifact = export_program(program, out, TorchMlirBackend(packing=packing, shards=shards), {})
    except QCompileError as error:
        return {**row, "result": str(error)[:120]}
    vocabulary = int(program.info["vocab_size"])
    random = torch.Generator().manual_seed(0)
    errors = []
    for length in LENGTHS:
        ids = torch.randint(0, vocabulary, (1, length), generator=random)
        expected = program(ids)
        errors.append(float((artifact.run(ids) - expected).abs().max() / expected.abs().max()))
    ids = torch.randint(0, vocabulary, (1, 5), generator=random)
    same = torch.equal(artifact.generate(ids, 32), generate(ProgramStepper(program), ids, 32))
    build = artifact.manifest.build
    return {
        **row,
        **{f"err {length}": f"{e:.0e}" for length, e in zip(LENGTHS, errors, strict=True)},
        "32 tokens": "equal" if same else "DIFFER",
        "devices": build["devices"],
        "compile s": f"{sum(a['seconds'] for a in build['attempts']):.0f}",
        "all s": f"{time.perf_counter() - start:.0f}",
        "result": "ok" if same and max(errors) <= 1e-4 else "FAILED",
    }


def kept_rows() -> list[dict[str, object]]:
    """Rows of the table in results/; none where there is no table."""
    file = RESULTS / "torch_mlir_matrix.md"
    lines = [line for line in file.read_text().splitlines() if line.startswith("| ")] if file.exists() else []
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(cells[0], row, strict=True)) for row in cells[1:]]


def merged(old: list[dict[str, object]], new: list[dict[str, object]]) -> list[dict[str, object]]:
    """Both, new rows in place of old ones, models in the order they came in, cases in that of CASES."""
    rows = {(r["model"], r["packing"], r["shards"]): r for r in [*old, *new]}
    names = list(dict.fromkeys(model for model, *_ in rows))
    return [rows[key] for name in names for case in CASES if (key := (name, *case)) in rows]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join([*NAMES, *families()]))
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--cases", help="PACKING/SHARDS, separated by commas; all without it")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    cases = CASES if options.cases is None else [tuple(c.split("/")) for c in options.cases.split(",")]
    if unknown := set(cases) - set(CASES):
        parser.error(f"no case {unknown}; cases are {', '.join('/'.join(c) for c in CASES)}")
    rows: list[dict[str, object]] = []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in models([n for n in options.models.split(",") if n], options.model):
            program = qcompile.compile(qcompile.capture(source, dtype="float32"), RECIPE).program
            for packing, shards in cases:
                rows.append(measure(name, program, packing, shards, Path(folder)))
                print(rows[-1], flush=True)
    notes = f"Weights {RECIPE['weights']}, head and activations float; max |Δlogit| / max |logit| against the Program."
    rows = merged(kept_rows(), rows) if options.cases is not None else rows
    publish("torch_mlir_matrix", "Models, packings and shards in iree-runtime", rows, notes)


if __name__ == "__main__":
    main()
