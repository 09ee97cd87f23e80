"""Bad input gets one line that names the thing and the way out, exit code 1, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from qcompile import zoo


@pytest.fixture
def model(tmp_path: Path) -> Path:
    copy = tmp_path / "model"
    shutil.copytree(zoo.path("llama"), copy)
    return copy


def refused(cli: Any, *arguments: object, says: str, out: Path | None = None) -> None:
    result = cli(*arguments)
    lines = [line for line in result.err.strip().splitlines() if line.startswith("qcompile: ")]
    assert result.code == 1, result.err
    assert len(lines) == 1
    assert lines[0].startswith("qcompile: error: "), lines[0]
    assert says in lines[0], lines[0]
    assert "Traceback" not in result.err
    if out is not None:
        assert not out.exists()
        assert not [p for p in out.parent.iterdir() if ".partial" in p.name]


def test_missing_weights(cli: Any, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").unlink()
    refused(cli, "export", model, "-o", tmp_path / "out", says="model.safetensors", out=tmp_path / "out")


def test_truncated_shard(cli: Any, model: Path, tmp_path: Path) -> None:
    data = (model / "model.safetensors").read_bytes()
    (model / "model.safetensors").write_bytes(data[: len(data) // 2])
    refused(cli, "export", model, "-o", tmp_path / "out", says="model.safetensors", out=tmp_path / "out")


def test_corrupt_header(cli: Any, model: Path, tmp_path: Path) -> None:
    (model / "model.safetensors").write_bytes(b"\xff" * 1000)
    refused(cli, "export", model, "-o", tmp_path / "out", says="model.safetensors", out=tmp_path / "out")


def test_pickled_weights_are_refused(cli: Any, model: Path) -> None:
    (model / "model.safetensors").rename(model / "pytorch_model.bin")
    refused(cli, "inspect", model, says="pytorch_model.bin, a pickle")


def test_unknown_architecture(cli: Any, model: Path) -> None:
    config = json.loads((model / "config.json").read_text())
    config["model_type"] = "lama"
    config["architectures"] = ["LamaForCausalLM"]
    (model / "config.json").write_text(json.dumps(config))
    refused(cli, "inspect", model, says="'lama'")


def test_no_such_model(cli: Any, tmp_path: Path) -> None:
    refused(cli, "inspect", tmp_path / "nothing", says="nothing")
    refused(cli, "inspect", "zoo:lama", says="llama")


def test_group_that_does_not_divide(cli: Any, model: Path, tmp_path: Path) -> None:
    arguments = ("export", model, "--set", "weights.group=96", "-o", tmp_path / "out")
    refused(cli, *arguments, says="96", out=tmp_path / "out")


def test_unknown_names(cli: Any, program_file: Path) -> None:
    refused(cli, "plan", "--recipe", "int4-g12", says="int4-g128")
    refused(cli, "plan", "--set", "weight.group=64", says="weights")
    refused(cli, "plan", "--set", "rules=[{match: model.layer.*, weights: null}]", says="model.layer")
    refused(cli, "export", "--target", "onnx", says="onnx_qcdq")
    refused(cli, "export", "--set", "target=onnx", says="onnx_qcdq")  # the recipe's target is read
    refused(cli, "export", "--option", "opsett=21", says="opset")
    refused(cli, "opt", program_file, "-p", "rnt", says="rtn")
    refused(cli, "opt", program_file, "-p", "insert-qdq(weight=int4)", says="weights")
    refused(cli, "opt", program_file, "-p", "insert-qdq(weights=int4 sim)", says="sym")


def test_output_not_empty(cli: Any, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(cli, "export", "-o", tmp_path, says="is not empty")
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_empty_prompt(cli: Any) -> None:
    refused(cli, "run", "zoo:llama", "--prompt", "", says="prompt is empty")


def test_ir_text_that_does_not_parse(cli: Any, tmp_path: Path) -> None:
    path = tmp_path / "bad.qir"
    path.write_text("def main(x: f32[2]):\n    y = aten.nonsense.default(x)\n    return {'y': y}")
    refused(cli, "inspect", path, says="line 2")


def test_tampered_artifact(cli: Any, tmp_path: Path) -> None:
    import qcompile

    out = tmp_path / "out"
    qcompile.compile(zoo.path("llama")).export("onnx_qcdq", out)
    path = out / "model.onnx.data"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    refused(cli, "verify", out, says="model.onnx.data was changed")
    path.write_bytes(data[:-10])
    refused(cli, "verify", out, says="model.onnx.data has")
    path.unlink()
    refused(cli, "verify", out, says="is missing")
    (out / "manifest.json").write_text("{")
    refused(cli, "verify", out, says="is not JSON")


@pytest.fixture
def program_file(tmp_path: Path) -> Path:
    path = tmp_path / "program.qir"
    path.write_text("def main(x: f32[2, 8], *, w: f32[4, 8]):\n    y = aten.linear.default(x, w)\n    return {'y': y}")
    return path


def test_an_option_that_another_target_has(cli: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ("export", "zoo:opt", "--target", "onnx_qcdq", "--packing", "unpacked", "-o", out)
    refused(cli, *arguments, says="'packing'", out=out)
