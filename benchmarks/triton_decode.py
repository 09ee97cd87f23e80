"""Decoding with a bundle of an 8B Llama shape at batch 1: tokens a second, beside what the bytes of its weights allow.

    python benchmarks/triton_decode.py --write                 a GPU; four layers, and the time of 32 by their
    difference python benchmarks/triton_decode.py --write --layers 32     all of them

Weights are zeros on disk (they cost none): only their shapes matter for time. Without a GPU it says so and stops.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

import torch
from common import publish
from llama_shapes import Shape, write

import qcompile
from qcompile.backends.triton.runtime import TritonRunner, gpu_name
from qcompile.backends.triton.session import Session
from qcompile.backends.triton.targets import GPUS

PROMPT, TOKENS = 128, 64


def main() -> None:
    if not torch.cuda.is_available():
        raise SystemExit("triton_decode.py needs a GPU and torch finds none")
    layers = int(sys.argv[sys.argv.index("--layers") + 1]) if "--layers" in sys.argv else 4
    counts = (layers,) if layers == 32 else (layers // 2, layers)
    found = {count: _measured(count) for count in counts}
    rows = [
        {
            **{"layers": count, "weights GB": f"{size / 1e9:.2f}", "ms a token": f"{1000 * seconds:.2f}"},
            **{"tokens a second": f"{1 / seconds:.0f}", "GB/s of packed weights": f"{size / seconds / 1e9:.0f}"},
        }
        for count, (seconds, size) in found.items()
    ]
    if len(found) == 2:
        (few, (low, small)), (many, (high, large)) = found.items()
        whole = high + (32 - many) * (high - low) / (many - few)
        size = large + (32 - many) * (large - small) // (many - few)
        rows.append(
            {
                **{"layers": "32, from these", "weights GB": f"{size / 1e9:.2f}", "ms a token": f"{1000 * whole:.2f}"},
                **{"tokens a second": f"{1 / whole:.0f}", "GB/s of packed weights": f"{size / whole / 1e9:.0f}"},
            }
        )
    note = f"{torch.cuda.get_device_name()}, batch 1, {PROMPT} tokens of prompt, int4 in groups of 128, bfloat16."
    publish("triton_decode", "Decoding an 8B Llama shape", rows, note)


def _measured(layers: int) -> tuple[float, int]:
    """Seconds a token, and bytes of the weights that a token reads (the embedding table is not)."""
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "model").mkdir()
        write(Path(folder) / "model", Shape(layers=layers), filled=False)
        model = qcompile.compile(Path(folder) / "model", "int4-g128", overrides=["verify=off"])
        gpu = gpu_name() if gpu_name() in GPUS else "none"
        artifact = model.export("triton", Path(folder) / "bundle", {"gpu": gpu})
        runner = TritonRunner(artifact.directory)
        tensors = artifact.manifest.tensors
        size = sum(entry.bytes for name, entry in tensors.items() if "embed" not in name)
        session = Session(runner, room=PROMPT + TOKENS + 8)
        token = session.prefill(torch.zeros(1, PROMPT, dtype=torch.int64, device="cuda")).argmax(-1)
        for _ in range(4):
            token = session.decode(token).argmax(-1)
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(TOKENS):
            token = session.decode(token).argmax(-1)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / TOKENS, size


if __name__ == "__main__":
    main()
