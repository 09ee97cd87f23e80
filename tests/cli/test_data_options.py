"""Options that say what a command is calibrated and measured on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

PROGRAM = """\
def main(input_ids: i64[batch, sequence], *, table: f32[50, 8], w: f32[8, 8]):
    x: f32[batch, sequence, 8] = aten.embedding.default(table, input_ids)
    y: f32[batch, sequence, 8] = aten.linear.default(x, w)
    return {"y": y}
"""
STATIC = "insert-qdq(activations=int8 sym static), calibrate"


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.qir"
    path.write_text(PROGRAM)
    np.save(tmp_path / "rows.npy", np.arange(50).reshape(5, 10))
    return path


def test_opt_is_told_how_to_read_data(cli: Any, program: Path) -> None:
    rows = ("--data", program.parent / "rows.npy", "--json")
    chosen = ("--set", "calibration.samples=3", "--set", "calibration.length=7")
    result = cli("opt", program, "-p", STATIC, *rows, *chosen)
    assert result.code == 0, result.err
    assert any(note.endswith("21 tokens") for note in json.loads(result.out)[1]["notes"])
    assert cli("bisect", program, "-p", STATIC, "--tolerance", "1", *rows, *chosen).code == 0
    for wrong, says in (
        ("samples=3", "only calibration.FIELD=VALUE can be set"),
        ("calibration.sampels=3", "samples"),
        ("calibration.packing=padded", "packing"),
        ("calibration.samples=6", "ask for samples=5"),
    ):
        refused = cli("opt", program, "-p", STATIC, *rows, "--set", "calibration.length=7", "--set", wrong)
        assert refused.code
        assert says in refused.err
        assert len(refused.err.strip().splitlines()) == 1


def test_a_field_of_the_file_holds_the_text(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"story": "one day there was a cat. " * 20}) + "\n" for _ in range(4)))
    result = cli("eval", "zoo:llama", "--data", path, "--field", "story", "--documents", "--json")
    assert result.code == 0, result.err
    assert json.loads(result.out)["sequences"] == 4
