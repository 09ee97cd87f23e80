"""Makes families and references importable, and float64 programs of the embedded models."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from qcompile import capture, run_passes
from qcompile.capture.dtypes import widen
from qcompile.ir.program import Program
from qcompile.zoo import path

sys.path.insert(0, str(Path(__file__).parents[2]))


@cache
def _embedded(name: str) -> Program:
    program = capture(path(name), dtype=torch.float64)
    widen(program)
    run_passes(program, "raise-norms")
    generator = torch.Generator().manual_seed(5)
    for node in program.weight_nodes:
        if node.meta["val"].ndim == 1 and node.meta["val"].dtype == torch.float64:  # gains and biases
            weight = program.weight(node)
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            program.set_weight(node, weight + 0.3 * weight.abs().mean() * noise)
    return program


@pytest.fixture
def embedded() -> Callable[[str], Program]:
    """A fresh copy of an embedded model in float64, norms raised, gains and biases away from where they were."""
    return lambda name: _embedded(name).clone()


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    """Two batches of token ids that every embedded model and family knows."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (2, length), generator=generator) for length in (8, 5)]
