"""Saving and loading a program: same text, same bits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import tokens

from qcompile.capture import capture
from qcompile.capture.saved import load_program, save_program
from qcompile.errors import ArtifactError, CaptureError
from qcompile.ir.program import Program

CODES = """def main(x: f32[batch, 6], *, c: i8[4, 6] = "w.codes", s: f32[4, 1] = "w.scale", h: bf16[3], e: f8e8m0[5], \
k: f8e4m3fn[3], b: bool[2], z: c128[2]):
    d: f32[4, 6] = qcompile.dequantize.default(c, s, None, "int8 sym channel")  # w
    y: f32[batch, 4] = aten.linear.default(x, d)  # w
    h2: f32[3] = aten.to.dtype(h, torch.float32)
    e2: f32[5] = aten.to.dtype(e, torch.float32)
    k2: f32[3] = aten.to.dtype(k, torch.float32)
    b2: f32[2] = aten.to.dtype(b, torch.float32)
    z2: f64[2] = aten.abs.default(z)
    return {"y": y, "h": h2, "e": e2, "k": k2, "b": b2, "z": z2}
"""


def test_a_model_comes_back(captured: Callable[[str], Any], tmp_path: Path) -> None:
    program, ids = captured("qwen3_moe").program.clone(), tokens()
    program.weights.edit("model.norm.weight", lambda w: 2 * w)
    save_program(program, tmp_path, shard_bytes=20_000)
    assert len(list(tmp_path.glob("weights-*.safetensors"))) > 3
    loaded = capture(tmp_path)
    assert str(loaded) == str(program)
    assert loaded.info == program.info
    assert torch.equal(loaded(ids), program(ids))
    exported = loaded.to_exported()
    assert exported.call_spec.in_spec == program.to_exported().call_spec.in_spec
    assert {str(r) for r in exported.range_constraints.values()} == {
        str(r) for r in program.to_exported().range_constraints.values()
    }


def test_codes_and_odd_element_types_come_back_bit_for_bit(tmp_path: Path) -> None:
    program = Program.parse(CODES)
    save_program(program, tmp_path)
    loaded = load_program(tmp_path)
    assert str(loaded) == str(program)
    for key in program.weights:
        before, after = program.weights[key], loaded.weights[key]
        assert before.dtype == after.dtype
        assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), key
    x = torch.randn(3, 6)
    assert torch.equal(loaded.run({"x": x})["y"], program.run({"x": x})["y"])


def test_files_are_what_safetensors_reads(captured: Callable[[str], Any], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    program = captured("llama").program
    save_program(program, tmp_path)
    (path,) = tmp_path.glob("weights-*.safetensors")
    tensors = load_file(path)
    assert set(tensors) == {program.key(n) for n in program.weight_nodes}
    assert all(torch.equal(tensors[key], program.weights[key]) for key in tensors)


def test_a_saved_program_is_not_written_over(tmp_path: Path) -> None:
    program = Program.parse(CODES)
    save_program(program, tmp_path)
    with pytest.raises(ArtifactError, match="choose another directory"):
        save_program(load_program(tmp_path), tmp_path)


def test_what_is_missing_or_cut_is_said(tmp_path: Path) -> None:
    save_program(Program.parse(CODES), tmp_path)
    (shard,) = tmp_path.glob("weights-*.safetensors")
    data = shard.read_bytes()
    shard.write_bytes(data[:-1])
    with pytest.raises(CaptureError, match="truncated"):
        load_program(tmp_path)
    shard.unlink()
    with pytest.raises(CaptureError, match="lacks weights-"):
        load_program(tmp_path)
    shard.write_bytes(data)
    text = (tmp_path / "program.qir").read_text()
    (tmp_path / "program.qir").write_text(text.replace("i8[4, 6]", "i8[4, 7]"))
    with pytest.raises(CaptureError, match="not a program that this version saved"):
        load_program(tmp_path)
    (tmp_path / "program.json").unlink()
    with pytest.raises(CaptureError, match=r"program\.json"):
        load_program(tmp_path)
    with pytest.raises(CaptureError, match=r"program\.qir"):
        load_program(tmp_path / "empty")
