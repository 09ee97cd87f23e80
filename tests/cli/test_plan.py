"""`qcompile plan` says what calibration would take, and runs nothing for it."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from qcompile.calibration.engine import Engine
from qcompile.cli.plan import estimates_of
from qcompile.ir.program import Program
from qcompile.recipe import Recipe, pipeline

GPTQ = ("plan", "--recipe", "gptq-int4", "--set", "weights.group=32")


def test_the_estimate_is_shown(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Engine, "run", lambda *_: pytest.fail("it was run"))
    shown = " ".join(cli(*GPTQ).out.split())
    assert "gptq(target=float) would take about" in shown
    assert "hessians" in shown
    assert "GB are free" in shown


def test_the_estimate_follows_the_samples(cli: Any) -> None:
    parts = []
    for samples in (8, 16):
        data = json.loads(cli(*GPTQ, "--set", f"calibration.samples={samples}", "--json").out)["calibration"]
        assert data["notes"] == []
        (found,) = data["estimates"].values()
        parts.append(found["bytes"])
    assert parts[1]["values"] == 2 * parts[0]["values"]
    assert parts[1]["hessians"] == parts[0]["hessians"]


def test_without_calibration_there_is_none(cli: Any) -> None:
    assert json.loads(cli("plan", "--json").out)["calibration"] == {"estimates": {}, "notes": []}


def test_what_does_not_fit_is_said(cli: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("qcompile.calibration.estimate.free_memory", lambda device: 1000)
    result = cli(*GPTQ)
    assert result.code == 0
    assert "calibration needs about" in result.out


def test_what_is_left_out_is_said_and_no_weight_is_read() -> None:
    text = "def main(input_ids: i64[batch, sequence], *, e: f32[9, 8], w: f32[8, 8]):\n"
    text += "    x = aten.embedding.default(e, input_ids)\n    y = aten.linear.default(x, w)\n    return {'y': y}"
    program = Program.parse(text)

    class Unreadable:
        shape, dtype = (8, 8), torch.float32

        def read(self) -> torch.Tensor:
            raise AssertionError("a plan reads no weights")

    program.weights.bind("w", Unreadable())
    recipe = Recipe(weights="int4 sym channel", passes=("raise-norms", "fold-norm-affine", "gptq"))
    found, notes = estimates_of(program, pipeline(recipe), recipe.calibration)
    assert list(found) == ["gptq"]
    assert found["gptq"].bytes["hessians"] == 8 * 8 * 8
    assert notes == ["estimated without fold-norm-affine, which is not run for a plan"]


def test_other_inputs_than_tokens_have_no_sizes() -> None:
    program = Program.parse(
        "def main(x: f32[n, 8], *, w: f32[8, 8]):\n    y = aten.linear.default(x, w)\n    return {'y': y}"
    )
    recipe = Recipe(weights="int4 sym channel", passes=("raise-norms", "gptq"))
    found, notes = estimates_of(program, pipeline(recipe), recipe.calibration)
    assert found == {}
    assert "takes x" in notes[0]
