"""Families as programs: they are what transformers computes, and raising their norms keeps it so.

A part of the families, in the tests' time; `benchmarks/coverage.py` looks at all of them in the same way.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from families import captured
from families.table import FAMILIES
from qcompile import run_passes

aten = torch.ops.aten
SOME = [name for name, family in FAMILIES.items() if family.default]


@cache
def made(name: str) -> captured.Captured:
    return captured.capture_family(name)


@pytest.mark.parametrize("name", SOME)
def test_the_program_is_the_model(name: str) -> None:
    for shape in captured.SHAPES:
        feeds = captured.inputs_of(name, *shape)
        ours = captured.logits(made(name).program, feeds)
        assert captured.error(ours, captured.theirs(made(name).model, feeds)) <= 1e-12


@pytest.mark.parametrize("name", SOME)
def test_every_norm_is_one_operator(name: str) -> None:
    program, feeds = made(name).program.clone(), captured.inputs_of(name, *captured.SHAPES[0])
    before = captured.logits(program, feeds)
    (report,) = run_passes(program, "raise-norms")
    assert report.skipped == []
    assert captured.error(captured.logits(program, feeds), before) <= 1e-10
    found = program.calls(aten.rms_norm.default, aten.layer_norm.default)
    assert len(found) == captured.norms(made(name).model, feeds)
    weights = [program.arg(node, "weight") for node in found]
    assert all(weight is None or program.is_weight(weight) for weight in weights)


def test_the_comparison_sees_an_eps_a_gain_and_a_cast() -> None:
    """Models whose eps is doubled, whose gain is negated, and which rounds to float32 once, are others."""
    model, feeds = made("llama").model, captured.inputs_of("llama", 2, 6)
    wanted, norm = captured.theirs(model, feeds), model.model.layers[1].input_layernorm

    def moved() -> float:
        return captured.error(captured.theirs(model, feeds), wanted)

    norm.variance_epsilon *= 2
    assert moved() > 1e-6
    norm.variance_epsilon /= 2
    assert moved() == 0
    with torch.no_grad():
        norm.weight.neg_()
        assert moved() > 1e-2
        norm.weight.neg_()
    handle = norm.register_forward_hook(_round)
    assert moved() > 1e-10
    handle.remove()


def _round(module: nn.Module, inputs: Any, output: Tensor) -> Tensor:
    return output.type(torch.FloatTensor).double()
