"""`qcompile formats`, and `qcompile inspect --spec`: what specs are, and what they do to the tensors of a file."""

from __future__ import annotations

import gc
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from qcompile.ir.weights import ShardSource


def refused(cli: Any, *arguments: object, says: str) -> None:
    result = cli(*arguments)
    lines = [line for line in result.err.strip().splitlines() if line.startswith("qcompile: ")]
    assert (result.code, len(lines)) == (1, 1), result.err
    assert lines[0].startswith("qcompile: error: ")
    assert says in lines[0], lines[0]
    assert result.out == ""


def seeded(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """Tensors that fit, that groups do not divide, that hold a nan, that are zeros, and what is no weight."""
    broken = seeded(4, 64)
    broken[1, 2] = math.nan
    tensors = {
        "layers.10.w": seeded(8, 64, seed=1).to(torch.bfloat16),
        "layers.2.w": seeded(8, 64, seed=2),
        "odd[i]": seeded(4, 48),
        "broken": broken,
        "zeros": torch.zeros(2, 64),
        "norm": torch.ones(64),
        "ids": torch.zeros(2, 64, dtype=torch.int64),
    }
    save_file(tensors, tmp_path / "some.safetensors")
    return tmp_path / "some.safetensors"


def test_the_list_has_elements_formats_and_words(cli: Any) -> None:
    result = cli("formats")
    assert result.code == 0
    for words in (
        "e4m3fnuz",
        "±6, least 0.5",
        "e2m1 group=32 scale=e8m0",
        "arXiv 2302.08007",
        "midmax",
        "half-quadratic",
    ):
        assert words in result.out, words
    data = json.loads(cli("formats", "--json").out)
    assert next(e for e in data["elements"] if e["name"] == "int4")["lowest"] == -8
    assert data["formats"]["nvfp4"]["is"] == "e2m1 group=16 scale=e4m3"
    assert "signed" in data["words"]["range"]


def test_one_spec_is_explained(cli: Any) -> None:
    result = cli("formats", "mxfp4(even)")
    assert result.code == 0, result.err
    for words in ("mxfp4(even) = e2m1 group=32 scale=e8m0(even)", "float8_e8m0fnu", "4.2500", "4096 × 128", "1.25e-02"):
        assert words in result.out, words
    assert "no: onnxruntime dequantizes no e2m1" in result.out


def test_words_need_no_quotes_and_groups_need_not_divide(cli: Any) -> None:
    data = json.loads(cli("formats", "int4", "asym", "group=96", "double=6x8", "--json").out)
    assert data["spec"] == data["is"] == "int4 asym group=96 double=6x8"
    assert data["shape"] == [4096, 4128]
    assert [p["name"] for p in data["parameters"]] == ["scale", "zero_point", "scale_step", "scale_offset"]
    parts = data["codes"]["bits"] + sum(p["bits_per_weight"] for p in data["parameters"])
    assert parts == pytest.approx(data["bits_per_weight"]) == pytest.approx(4 + (6 + 4 + 64 / 8) / 96, rel=1e-4)
    for error in data["errors"].values():
        assert error["relative"] == pytest.approx(10 ** (-error["sqnr_db"] / 10))
    assert data["fields"]["zero"]["value"] == "int"
    assert data["targets"]["weight"]["onnx_qcdq"] != []


def test_what_a_spec_is_for_decides_what_targets_are_asked(cli: Any) -> None:
    targets = json.loads(cli("formats", "int8 asym tensor static", "--json").out)["targets"]
    assert set(targets) == {"activation"}
    for name in ("onnx_qcdq", "torch_mlir", "triton"):
        assert targets["activation"][name] == []
    assert set(json.loads(cli("formats", "e4m3fn no_scale", "--json").out)["targets"]) == {"weight", "activation"}
    assert "of shape [" in cli("formats", "int8 block=16x16 dynamic").out  # not taken for markup


def test_bad_specs(cli: Any) -> None:
    refused(cli, "formats", "int4 sim", says="did you mean 'sym'")
    refused(cli, "formats", "mxfp5", says="unknown element 'mxfp5'")
    refused(cli, "formats", "int4 group=3000000", says="too large to try")
    refused(cli, "inspect", "zoo:llama", "--spec", "nf4 asym", says="drop asym")


def test_tensors_of_a_file(cli: Any, weights: Path) -> None:
    result = cli("inspect", "--weights", weights, "--spec", "int4 narrow group=32", "--json")
    assert result.code == 0, result.err
    data = json.loads(result.out)
    rows = {row["name"]: row for row in data["tensors"]}
    assert list(rows) == ["broken", "layers.2.w", "layers.10.w", "odd[i]", "zeros"]
    spec = "int4 sym narrow group=32"
    x = seeded(8, 64, seed=2).double()
    scale = x.float().view(8, 2, 32).abs().amax(2, keepdim=True) / 7
    y = ((x.view(8, 2, 32) / scale).round() * scale.double()).view(8, 64)
    expected = float((x - y).square().sum() / x.square().sum())
    found = rows["layers.2.w"]["specs"][spec]
    assert found["relative_error"] == pytest.approx(expected, rel=1e-5)
    assert found["sqnr_db"] == pytest.approx(-10 * math.log10(expected), rel=1e-5)
    assert found["bits_per_weight"] == 5
    assert rows["layers.2.w"]["amax"] == pytest.approx(float(x.abs().max()))
    assert rows["layers.2.w"]["amax_over_rms"] == pytest.approx(
        float(x.abs().max() / x.square().mean().sqrt()), rel=1e-6
    )
    assert rows["layers.10.w"]["dtype"] == "bfloat16"
    assert "nearest divisors are 24 and 48" in rows["odd[i]"]["specs"][spec]["reason"]
    assert rows["broken"]["specs"][spec] == {"reason": "holds nan or infinity; find their source"}
    assert (rows["broken"]["amax"], rows["broken"]["shape"]) == (None, [4, 64])
    assert rows["zeros"]["specs"][spec]["relative_error"] is None
    assert data["overall"][spec]["tensors"] == 3


def test_the_last_line_is_over_all_tensors_that_fit(cli: Any, tmp_path: Path) -> None:
    tensors = {"a": seeded(4, 64), "b": 8 * seeded(16, 64, seed=1)}
    save_file(tensors, tmp_path / "w.safetensors")
    data = json.loads(cli("inspect", "--weights", tmp_path / "w.safetensors", "--spec", "int8 tensor", "--json").out)
    one, two = (row["specs"]["int8 sym tensor"] for row in data["tensors"])
    energy = [float(x.double().square().sum()) for x in tensors.values()]
    whole = data["overall"]["int8 sym tensor"]
    noise = one["relative_error"] * energy[0] + two["relative_error"] * energy[1]
    assert whole["relative_error"] == pytest.approx(noise / sum(energy))
    assert whole["bits_per_weight"] == pytest.approx(8 + 2 * 32 / (20 * 64))


def test_several_specs_are_columns(cli: Any, weights: Path) -> None:
    table = cli(
        "inspect", "--weights", weights, "--spec", "int4 group=32", "--spec", "mxfp4", "--spec", "int4 group=32"
    )
    assert table.code == 0, table.err
    assert table.out.count("mxfp4") == 1
    assert "2 of 5" not in table.out
    assert table.out.count("3 of 5") == 2
    assert "odd[i]" in table.out
    assert "*1 holds nan or infinity" in table.out
    assert "*2 group=32 does not divide axis 1 of shape [4, 48]" in table.out
    assert cli("inspect", "--weights", weights, "--spec", "mxfp4").out.count("SQNR") == 1
    plain = cli("inspect", "--weights", weights)
    assert plain.code == 0
    assert "amax/rms" in plain.out


def test_models_and_their_shards(cli: Any, tmp_path: Path) -> None:
    assert json.loads(cli("inspect", "--spec", "mxfp4", "--json").out)["weights"] == "zoo:llama"
    tensors = {f"layer.{i}.weight": seeded(4, 32, seed=i) for i in range(2)}
    for i, (name, tensor) in enumerate(tensors.items()):
        save_file({name: tensor}, tmp_path / f"part-{i}.safetensors")
    index = {"weight_map": {name: f"part-{i}.safetensors" for i, name in enumerate(tensors)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    for arguments in ((tmp_path,), ("--weights", tmp_path)):
        data = json.loads(cli("inspect", *arguments, "--spec", "mxfp4", "--json").out)
        assert [row["name"] for row in data["tensors"]] == list(tensors)
    data = json.loads(cli("inspect", "--weights", tmp_path / "part-1.safetensors", "--spec", "mxfp4", "--json").out)
    assert [row["name"] for row in data["tensors"]] == ["layer.1.weight"]


def test_one_tensor_is_held_at_a_time(cli: Any, weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read, held, alive = ShardSource.read, [], []

    def watched(self: ShardSource) -> torch.Tensor:
        gc.collect()
        alive.append(sum(reference() is not None for reference in held))
        tensor = read(self)
        held.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(ShardSource, "read", watched)
    assert cli("inspect", "--weights", weights, "--spec", "mxfp4", "--spec", "int4").code == 0
    assert alive == [0] * 5


def test_files_that_hold_no_weights(cli: Any, tmp_path: Path) -> None:
    refused(cli, "inspect", "--weights", tmp_path / "no.safetensors", "--spec", "int4", says="does not exist")
    refused(cli, "inspect", "--weights", tmp_path / "no", "--spec", "int4", says="does not exist")
    refused(cli, "inspect", "--weights", tmp_path, "--spec", "int4", says="has no weights")
    save_file({"ids": torch.zeros(2, 2, dtype=torch.int64)}, tmp_path / "ids.safetensors")
    refused(cli, "inspect", "--weights", tmp_path / "ids.safetensors", "--spec", "int4", says="only int64")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "ids.safetensors").read_bytes()[:40])
    refused(cli, "inspect", "--weights", tmp_path / "cut.safetensors", "--spec", "int4", says="truncated")
    (tmp_path / "some.bin").write_bytes(b"")
    refused(cli, "inspect", "--weights", tmp_path / "some.bin", "--spec", "int4", says="is a pickle")


def test_options_that_exclude_each_other(cli: Any, weights: Path) -> None:
    refused(cli, "inspect", "zoo:llama", "--weights", weights, says="both say where the weights are")
    refused(cli, "inspect", "zoo:llama", "--spec", "int4", "--text", says="keep one")


def test_help(cli: Any) -> None:
    assert "--weights" in cli("inspect", "--help").out
    help_ = cli("formats", "--help")
    assert help_.code == 0
    assert "SPEC" in help_.out
