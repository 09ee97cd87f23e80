"""Tuning: each configuration of a site is tried, and the fastest is written back where the launcher reads it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile.artifact import export_program
from qcompile.backends.triton.backend import TritonBackend
from qcompile.backends.triton.bundle import CHOICES, Choices, read_json
from qcompile.backends.triton.launch import Launch
from qcompile.backends.triton.launcher import BundleDispatcher
from qcompile.backends.triton.ops.registration import PLANS
from qcompile.backends.triton.runtime import TritonRunner
from qcompile.backends.triton.tune import measure, write_choices
from qcompile.ir.program import Program

pytestmark = pytest.mark.usefixtures("triton")


def test_the_fastest_is_written_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = Program.parse(
        "def main(x: f32[batch, 64], *, w: f32[48, 64]):\n    y = aten.linear.default(x, w)\n    return {'y': y}"
    )
    qcompile.run_passes(program, "insert-qdq(weights=int4 group=32), rtn")
    directory = export_program(program, tmp_path / "out", TritonBackend("none"), {}).directory
    runner = TritonRunner(directory, "cpu")
    all_labels = {"sm_90": tuple(f"m{m}_n{n}_w{w}_s{s}_r2 parts=1" for m, n, w, s in ((16, 64, 4, 4), (16, 128, 4, 3)))}
    site = "weight_only int4 bits=4 k=64 block_k=32 group=32 rows=1 zero=none scale=float outer=0 times=1.0 layout=tile"
    bundle = runner.bundle.model_copy(update={"sites": {f"{site} n=48 float32 rows=16": all_labels}})
    launched: list[Launch] = []
    made = BundleDispatcher(directory, bundle, "sm_90", None, None, None)
    monkeypatch.setattr(made, "launch", launched.extend)

    def timer(function: Callable[[], None]) -> float:
        _plan_instead(runner, function)
        return 1.0 if "n128" in launched[-1].config.label else 2.0

    found = measure(runner, made, timer)
    assert found[f"{site} n=48 float32 rows=16"] == [(all_labels["sm_90"][0], 2.0), (all_labels["sm_90"][1], 1.0)]
    lines = write_choices(directory, bundle, "sm_90", found)
    assert any("m16_n128_w4_s3_r2 parts=1, 1.0 µs of 2 tried" in line for line in lines)
    chosen = read_json(directory / CHOICES, Choices).gpus["sm_90"]
    assert chosen[f"{site} n=48 float32 rows=16"] == (all_labels["sm_90"][1], 1.0)
    qcompile.verify(directory)  # the manifest knows the new file
    write_choices(directory, bundle, "gfx942", found)
    assert set(read_json(directory / CHOICES, Choices).gpus) == {"sm_90", "gfx942"}


def _plan_instead(runner: TritonRunner, function: Callable[[], None]) -> None:
    """What `function` calls an operator with, planned and launched through the dispatcher in use."""
    from qcompile.backends.triton.launch import dispatcher

    defaults: Any = function.__defaults__
    target, arguments = defaults
    _, launches = PLANS[target](*arguments)
    dispatcher().launch(launches)
    assert isinstance(arguments[0], torch.Tensor)
    assert runner.executor == "cpu"
