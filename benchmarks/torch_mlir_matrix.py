"""Embedded models and tiny ones of four families through both packings and both kinds of shards, in iree-runtime.

python benchmarks/torch_mlir_matrix.py [--models llama,opt] [--model DIRECTORY] [--write]

Each artifact is compared with its Program at lengths 1, 2, 7 and 64 and on 32 greedy tokens. About a minute a row.
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
from common import publish

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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--models", default=",".join([*NAMES, *families()]))
    parser.add_argument("--model", type=Path, action="append", default=[])
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for name, source in models([n for n in options.models.split(",") if n], options.model):
            program = qcompile.compile(qcompile.capture(source, dtype="float32"), RECIPE).program
            for packing, shards in CASES:
                rows.append(measure(name, program, packing, shards, Path(folder)))
                print(rows[-1], flush=True)
    notes = f"Weights {RECIPE['weights']}, head and activations float; max |Δlogit| / max |logit| against the Program."
    publish("torch_mlir_matrix", "Models, packings and shards in iree-runtime", rows, notes)


if __name__ == "__main__":
    main()
