"""Reading a bundle back: codes as they lie in it, and the first value that it computes otherwise."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.triton.bundle import Bundle
from qcompile.backends.triton.storing import unpacked
from qcompile.ir.program import Program
from qcompile.ir.run import run


def stored_codes(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(weight name, codes in the program's layout) of every quantized weight in a bundle, one at a time."""
    from safetensors import safe_open

    bundle = Bundle.read(directory)
    file_of = {key: directory / file for file, keys in bundle.shards.items() for key in keys}

    def read(key: str) -> Tensor:
        with safe_open(file_of[key], framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(key)
        return tensor

    for name, entry in bundle.weights.items():
        yield name, unpacked(entry.packed(name), [read(key) for key in entry.planes])
    for key in file_of:
        if key.endswith(".codes"):
            yield key.removesuffix(".codes"), read(key)


def first_difference(program: Program, directory: Path, feeds: Mapping[str, Tensor], tolerance: float) -> str:
    """The first node, by name, that both graphs have and whose values differ by more than `tolerance` of the
    largest."""
    from qcompile.backends.triton.launch import dispatching
    from qcompile.backends.triton.runtime import TritonRunner

    runner, expected = TritonRunner(directory), dict[str, Tensor]()

    def remember(node: fx.Node, value: Any) -> None:
        if isinstance(value, Tensor) and value.is_floating_point():
            expected[node.name] = value

    run(program, feeds, remember)
    found: list[str] = []

    def compare(node: fx.Node, value: Any) -> None:
        old = expected.get(node.name)
        if found or old is None or not isinstance(value, Tensor) or old.shape != value.shape or not old.numel():
            return
        gap = (value.cpu().double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-300)
        if not float(torch.nan_to_num(gap, nan=float("inf"))) <= tolerance:
            found.append(f"{node.name} (module {program.module_of(node) or 'top'}), by {float(gap):.1e}")

    there = {name: tensor.to(runner.device) for name, tensor in feeds.items()}
    if runner.dispatcher is None:
        run(runner.program, there, compare)
    else:
        with dispatching(runner.dispatcher):
            run(runner.program, there, compare)
    return found[0] if found else "unknown"
