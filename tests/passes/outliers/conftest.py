"""Float64 programs of the embedded models with folded norms, what their products read, and how it stands out."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompile import run_passes
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run


@pytest.fixture(scope="session")
def folded(embedded: Callable[[str], Program]) -> Callable[[str], Program]:
    """A fresh copy of an embedded model in float64, gains and biases away from where they were, norms folded."""
    made: dict[str, Program] = {}

    def make(name: str) -> Program:
        if name not in made:
            made[name] = embedded(name)
            run_passes(made[name], "fold-norm-affine, center-norm")
        return made[name].clone()

    return make


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
