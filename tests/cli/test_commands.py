"""Every command, on an embedded model: what it prints for people and for machines, and its exit code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

COMMANDS = ["export", "eval", "verify", "inspect", "plan", "opt", "bisect", "passes", "recipes", "targets", "run"]
SMALL = """\
def main(x: f32[batch, 8], *, w: f32[4, 8]):
    y: f32[batch, 4] = aten.linear.default(x, w)
    z: f32[batch, 4] = aten.relu.default(y)
    return {"z": z}
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import qcompile

    out = tmp_path_factory.mktemp("artifact") / "out"
    qcompile.compile(_zoo("llama")).export("onnx_qcdq", out)
    return out


@pytest.fixture
def program(tmp_path: Path) -> Path:
    path = tmp_path / "program.qir"
    path.write_text(SMALL)
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_help(cli: Any, command: str) -> None:
    result = cli(command, "--help")
    assert result.code == 0
    assert "--debug" in result.out


def test_help_documents_exit_codes(cli: Any) -> None:
    assert "Exit codes" in cli("--help").out


def test_export_prints_what_matters(cli: Any, tmp_path: Path) -> None:
    result = cli("export", "-o", tmp_path / "out")
    assert result.code == 0, result.err
    for words in (
        "model.onnx",
        "float32",
        "bits per weight",
        "before",
        "after",
        "KL to the original",
        "onnxruntime agrees",
    ):
        assert words in result.out, words


def test_export_json(cli: Any, tmp_path: Path) -> None:
    result = cli("export", "--json", "--no-evaluate", "-o", tmp_path / "out", "--set", "weights.group=32")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert data["manifest"]["recipe"]["weights"] == "int4 sym group=32"
    assert data["manifest"]["agreement"]["max_relative_error"] <= 1e-3
    assert data["evaluation"] is None


def test_verify(cli: Any, artifact: Path) -> None:
    assert "as computed" in cli("verify", artifact).out
    assert json.loads(cli("verify", artifact, "--json").out)["ok"] is True


def test_eval_of_an_artifact_knows_its_original(cli: Any, artifact: Path) -> None:
    result = cli("eval", artifact, "--limit", 4, "--length", 64, "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    assert 1 < data["perplexity"] < 100
    assert 0 < data["kl"]["mean"] < 1
    assert 0.5 < data["top1"]["mean"] <= 1


def test_inspect(cli: Any, artifact: Path, program: Path) -> None:
    assert "int4" in cli("inspect", artifact).out
    assert json.loads(cli("inspect", artifact, "--json").out)["target"] == "onnx_qcdq"
    facts = json.loads(cli("inspect", "zoo:llama", "--json").out)
    assert facts["outputs"][0] == "logits"
    assert facts["operators"]["aten.linear.default"] > 10
    assert cli("inspect", program, "--text").out == SMALL
    assert "aten.relu.default" in cli("inspect", program).out


def test_plan_computes_nothing_and_names_every_layer(cli: Any) -> None:
    result = cli("plan", "zoo:opt", "--json", "--target", "onnx_qcdq")
    data = json.loads(result.out)
    assert data["obstacles"] == []
    assert data["passes"][-1] == "rtn"
    assert any(site["role"] == "head" for site in data["plan"]["sites"])
    assert "bits per weight" in cli("plan").out


def test_opt_prints_the_program(cli: Any, program: Path, tmp_path: Path) -> None:
    result = cli("opt", program, "-p", "insert-qdq(weights=int4 sym group=4), rtn", "--drift")
    assert result.code == 0, result.err
    assert "qcompile.dequantize.default" in result.out
    assert cli("opt", program, "-p", "rtn", "-o", tmp_path / "out.qir").code == 0
    assert (tmp_path / "out.qir").read_text() == SMALL
    assert cli("opt", program, "-p", "insert-qdq(weights=int4 sym group=4), rtn", "-o", tmp_path / "saved").code == 0
    assert cli("inspect", tmp_path / "saved").code == 0
    assert cli("opt", program, "-p", "rtn", "-o", tmp_path / "out.pt2").code == 0
    assert "aten.linear" in cli("inspect", tmp_path / "out.pt2", "--text").out


def test_opt_dumps_between_passes(cli: Any, program: Path, tmp_path: Path) -> None:
    cli("opt", program, "-p", "dead-code, insert-qdq(weights=int4 sym group=4), rtn", "--dump", tmp_path / "dumps")
    names = sorted(p.name for p in (tmp_path / "dumps").iterdir())
    assert names == ["00_input.qir", "01_dead-code.qir", "02_insert-qdq.qir", "03_rtn.qir"]


def test_bisect_names_the_culprit(cli: Any, program: Path) -> None:
    pipeline = "dead-code, insert-qdq(weights=int2 sym group=4), rtn"
    data = json.loads(cli("bisect", program, "-p", pipeline, "--json").out)
    assert (data["index"], data["culprit"]) == (1, "insert-qdq(weights=int2 sym group=4)")
    assert "no pass moves" in cli("bisect", program, "-p", "dead-code").out


def test_lists(cli: Any) -> None:
    assert {"rtn", "raise-norms", "insert-qdq", "calibrate"} <= set(json.loads(cli("passes", "--json").out))
    assert "int8-static" in cli("recipes").out
    assert "weights: int4 sym group=128" in cli("recipes", "int4-g128").out
    assert "onnx_qcdq" in cli("targets").out


def test_run_continues_a_text(cli: Any, artifact: Path) -> None:
    data = json.loads(cli("run", artifact, "--prompt", "KING", "-n", 8, "--json").out)
    assert data["tokens"] == 8
    assert "KING" in data["text"]
    assert cli("run", "zoo:llama", "--prompt", "KING", "-n", 4).code == 0


def _zoo(name: str) -> Path:
    from qcompile import zoo

    return zoo.path(name)
