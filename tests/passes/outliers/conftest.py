"""Float64 programs of the embedded models with folded norms, what their products read, and how it stands out."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompile import capture, run_passes
from qcompile.capture.dtypes import widen
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.zoo import path


@cache
def _folded(name: str) -> Program:
    program = capture(path(name), dtype=torch.float64)
    widen(program)
    run_passes(program, "raise-norms")
    generator = torch.Generator().manual_seed(5)
    for node in program.weight_nodes:
        if node.meta["val"].ndim == 1 and node.meta["val"].dtype == torch.float64:  # gains and biases
            weight = program.weight(node)
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            program.set_weight(node, weight + 0.3 * weight.abs().mean() * noise)
    run_passes(program, "fold-norm-affine, center-norm")
    return program


@pytest.fixture
def folded() -> Callable[[str], Program]:
    """A fresh copy of an embedded model in float64, gains and biases away from where they were, norms folded."""
    return lambda name: _folded(name).clone()


@pytest.fixture
def tokens() -> list[Tensor]:
    """Two batches of token ids that every embedded model knows."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (4, length), generator=generator) for length in (24, 16)]


@pytest.fixture
def peaks(tokens: list[Tensor]) -> Callable[[Program], dict[str, float]]:
    """For each product by name, max |x| over the root mean square of what it reads, the mean over all vectors."""

    def measure(program: Program) -> dict[str, float]:
        found: dict[str, float] = {}
        products = find_contractions(program)

        def observe(node: fx.Node, value: Any) -> None:
            for c in products:
                if c.input is node:
                    rows = value.movedim(c.input_axis, -1).flatten(0, -2)
                    rows = rows[rows.abs().amax(1) > 0]  # a row of padding of an expert, or all of it behind a relu
                    found[c.node.name] = float((rows.abs().amax(1) / rows.square().mean(1).sqrt()).mean())

        run(program, fill(program, {"input_ids": tokens[0]}), observe)
        return found

    return measure
