"""Which dtype a program has, and that casts happen as weights are read."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import error, save, tokens

from qcompile.capture import capture
from qcompile.errors import CaptureError
from qcompile.ir.weights import ShardSource

HALVES = (torch.float16, torch.bfloat16)


@pytest.fixture(scope="module", params=HALVES, ids=str)
def half(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, torch.dtype]:
    from capture_models import build

    directory = tmp_path_factory.mktemp("half")
    build("llama", num_hidden_layers=1).to(request.param).save_pretrained(directory)
    return directory, request.param


def test_half_precision_is_captured_in_float32_unless_asked(half: tuple[Path, torch.dtype]) -> None:
    from transformers import AutoModelForCausalLM

    directory, dtype = half
    ids = tokens()
    for asked, wanted in ((None, torch.float32), ("auto", dtype))[: 1 + (dtype is torch.bfloat16)]:
        program = capture(directory, dtype=asked)
        model = AutoModelForCausalLM.from_pretrained(directory, dtype=wanted).eval()
        with torch.no_grad():
            assert error(program(ids).float(), model(ids).logits.float()) <= 1e-6
        assert program.info["dtype"] == str(wanted).removeprefix("torch.")
        assert program.weights["model.layers.0.mlp.up_proj.weight"].dtype == wanted


def test_float64_is_float64_throughout(captured: Callable[[str], Any], tmp_path: Path) -> None:
    """The norms' and the rotary tables' own float32 is widened: two exact forms of one model agree to 1e-14."""
    case, ids = captured("qwen3_moe"), tokens()
    program = capture(case.directory, dtype="float64")
    assert "f32" not in str(program)
    assert "torch.float32" not in str(program)
    logits = program(ids)
    assert logits.dtype == torch.float64
    with torch.no_grad():
        assert error(logits, case.model(ids).logits.double()) <= 1e-5
    scaled = program.clone()  # twice an up projection, half a down projection: the same function
    scaled.weights.edit("model.layers.0.mlp.experts.down_proj", lambda w: w / 3)
    width = 24
    scaled.weights.edit(
        "model.layers.0.mlp.experts.gate_up_proj", lambda w: torch.cat([w[:, :width], w[:, width:] * 3], 1)
    )
    assert error(scaled(ids), logits) <= 1e-14


def test_reading_is_lazy_and_casts_are_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    read = ShardSource.read

    def counted(self: ShardSource) -> torch.Tensor:
        reads.append(self.name)
        return read(self)

    monkeypatch.setattr(ShardSource, "read", counted)
    program = capture(save("llama", tmp_path, num_hidden_layers=1), dtype=torch.float64)
    assert reads == []
    assert program.weights["model.norm.weight"].dtype == torch.float64
    assert reads == ["model.norm.weight"]


def test_other_dtypes_are_refused(tmp_path: Path) -> None:
    for dtype in ("int8", "float99", torch.int64):
        with pytest.raises(CaptureError, match="not one to capture in"):
            capture(tmp_path, dtype=dtype)
