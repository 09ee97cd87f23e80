"""`qcompile inspect --spaces`: the table, the data, the picture, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

PROGRAM = """\
def main(x: f32[batch, 8], *, w: f32[8, 8], g: f32[8], v: f32[4, 8]):
    y: f32[batch, 8] = aten.linear.default(x, w)
    p: f32[batch, 8] = aten.pow.Tensor_Scalar(y, 2)
    m: f32[batch, 1] = aten.mean.dim(p, [-1], True)
    e: f32[batch, 1] = aten.add.Tensor(m, 1e-05)
    r: f32[batch, 1] = aten.rsqrt.default(e)
    n: f32[batch, 8] = aten.mul.Tensor(y, r)
    s: f32[batch, 8] = aten.mul.Tensor(n, g)
    z: f32[batch, 4] = aten.linear.default(s, v)
    return {"z": z}
"""


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.qir"
    path.write_text(PROGRAM)
    return path


def _widths(cli: Any, program: Path, *options: object) -> list[tuple[int, list[str]]]:
    result = cli("inspect", program, "--spaces", "--json", *options)
    assert result.code == 0, result.err
    return [(d["width"], d["admits"]) for d in json.loads(result.out)]


def test_norms_are_raised_unless_other_passes_are_given(cli: Any, program: Path) -> None:
    assert (8, ["diagonal"]) in _widths(cli, program)
    folded = _widths(cli, program, "--passes", "raise-norms, fold-norm-affine")
    assert (8, ["permutation", "orthogonal"]) in folded
    assert not any("orthogonal" in admits for _, admits in _widths(cli, program))
    spelled = json.loads(cli("inspect", program, "--spaces", "--json", "--passes", "").out)
    assert "raise-norms" in {limit["lift"] for d in spelled for limit in d["limits"]}


def test_a_level_leaves_out_the_rest(cli: Any, program: Path) -> None:
    assert _widths(cli, program, "--level", "diagonal") == [(8, ["diagonal"])]
    assert _widths(cli, program, "--level", "linear") == []


def test_the_table(cli: Any) -> None:
    result = cli("inspect", "zoo:moe", "--spaces")
    assert result.code == 0, result.err
    for words in ("stream", "fold-norm-affine", "general linear", "layers.0–2", "× 3"):
        assert words in result.out, words
    assert cli("inspect", "zoo:moe", "--spaces", "--all").out.count("heads") == 3
    assert result.out.count("heads") == 1


@pytest.mark.parametrize("ending", ["svg", "html"])
def test_the_picture(cli: Any, program: Path, tmp_path: Path, ending: str) -> None:
    picture = tmp_path / f"spaces.{ending}"
    result = cli("inspect", program, "--spaces", "--picture", picture)
    assert result.code == 0, result.err
    assert "<svg" in picture.read_text()
    assert ("<html" in picture.read_text()) is (ending == "html")
    assert str(picture) in result.err
    assert "exists" in cli("inspect", program, "--spaces", "--picture", picture).err


def test_passes_without_spaces(cli: Any, program: Path) -> None:
    assert "rms_norm" in cli("inspect", program, "--text", "--passes", "raise-norms").out
    assert "rms_norm" not in cli("inspect", program, "--text").out


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--level", "diagonal"], "add --spaces"),
        (["--all"], "add --spaces"),
        (["--picture", "spaces.svg"], "add --spaces"),
        (["--spaces", "--text"], "keep one of them"),
        (["--spaces", "--level", "cubic"], "permutation, diagonal, orthogonal, linear"),
        (["--spaces", "--picture", "spaces.png"], ".svg or .html"),
        (["--spaces", "--spec", "int4"], "keep one"),
        (["--spaces", "--passes", "nonsense"], "nonsense"),
    ],
)
def test_refusals_are_one_line(cli: Any, program: Path, options: list[str], says: str) -> None:
    result = cli("inspect", program, *options)
    assert result.code != 0
    assert says in result.err
    assert len(result.err.strip().splitlines()) == 1
