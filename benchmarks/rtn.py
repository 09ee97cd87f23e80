"""Round to nearest, int4 in groups of 128, over 1 GB of float32 weights, beside a copy of the same bytes."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from common import publish

from qcompile.numerics.spec import QuantSpec

SHAPE, COUNT, ROUNDS = (4096, 4096), 16, 5  # 16 × 64 MiB


def timed(body: Callable[[], None]) -> float:
    start = time.perf_counter()
    body()
    return time.perf_counter() - start


def main() -> None:
    weights = [torch.randn(SHAPE) for _ in range(COUNT)]
    target = [torch.empty(SHAPE) for _ in range(COUNT)]  # touched by the first round, which is not counted
    gigabytes = sum(w.numel() * 4 for w in weights) / 1e9
    rows: list[dict[str, object]] = []
    for text in ("int4 sym group=128", "int4 asym group=128", "int8 sym channel"):
        spec = QuantSpec.parse(text)

        def copy() -> None:
            for source, destination in zip(weights, target, strict=True):
                destination.copy_(source)

        def quantize(spec: QuantSpec = spec) -> None:
            for weight in weights:
                spec.quantize(weight)

        copies, rounds = [], []
        for _ in range(ROUNDS + 1):
            copies.append(timed(copy))
            rounds.append(timed(quantize))
        copied, quantized = statistics.median(copies[1:]), statistics.median(rounds[1:])
        rows.append(
            {
                "spec": text,
                "copy GB/s": f"{gigabytes / copied:.2f}",
                "quantize GB/s": f"{gigabytes / quantized:.2f}",
                "ratio of times": f"{quantized / copied:.2f}",
            }
        )
    notes = f"{gigabytes:.2f} GB read, {torch.get_num_threads()} threads, medians of {ROUNDS}. Target: ratio at most 6."
    publish("rtn", "Round to nearest beside a copy", rows, notes)


if __name__ == "__main__":
    main()
