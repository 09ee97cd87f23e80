"""The runner refuses what does not fit, in one line."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from onnx_programs import Lowered, prompt

from qcompile.backends.onnx_qcdq.names import program_name, public_name
from qcompile.backends.onnx_qcdq.runtime import OnnxRunner
from qcompile.errors import ArtifactError, QCompileError
from qcompile.ir.run import fill


@pytest.mark.parametrize(
    "name",
    [
        "past_key_values_0_key",
        "present_12_value",
        "past_key_values_0_key_zero_point",
        "present_3_value_scale",
        "input_ids",
    ],
)
def test_names_go_there_and_back(name: str) -> None:
    assert program_name(public_name(name)) == name


def test_takes_the_files_names_too(lowered: Callable[[str, str, str | None], Lowered]) -> None:
    made = lowered("llama", "int4 sym group=32", None)
    runner = OnnxRunner(made.directory)
    feeds = fill(made.program, {"input_ids": prompt()})
    again = runner.run({public_name(name): tensor for name, tensor in feeds.items()})
    assert torch.equal(runner.run(feeds)["logits"], again["logits"])
    assert list(again) == list(made.program.output_names)


def test_inputs_that_do_not_fit(lowered: Callable[[str, str, str | None], Lowered]) -> None:
    made = lowered("llama", "int4 sym group=32", None)
    runner = OnnxRunner(made.directory)
    feeds = fill(made.program, {"input_ids": prompt()})
    with pytest.raises(QCompileError, match="'input_ids' is missing"):
        runner.run({})
    with pytest.raises(QCompileError, match="'labels' is unknown"):
        runner.run({**feeds, "labels": prompt()})
    with pytest.raises(QCompileError, match=r"torch.int32\[2, 9\]; the model takes torch.int64 of rank 2"):
        runner.run({**feeds, "input_ids": prompt().int()})


def test_directories_that_hold_no_model(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no model.onnx"):
        OnnxRunner(tmp_path)
    (tmp_path / "model.onnx").write_bytes(b"no model")
    with pytest.raises(ArtifactError, match="does not load"):
        OnnxRunner(tmp_path)
