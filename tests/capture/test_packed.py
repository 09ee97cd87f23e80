"""Codes lie densely packed in the files of a saved program, and come back bit for bit or not at all."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.capture.packed import packings, weight_parts
from qcompile.capture.saved import load_program, save_program
from qcompile.compiled import CompiledModel, load
from qcompile.errors import CaptureError, SpecError
from qcompile.ir.program import Program
from qcompile.numerics import QuantSpec
from qcompile.recipe import Recipe
from qcompile.report import CompileReport

SPECS = [
    "int3 sym group=16",
    "int4 asym group=16 scale=f16",
    "int4 asym group=16 zero=float",
    "uint5 asym channel",
    "int8 sym narrow channel",
    "ternary sym group=16 scale=f16",
    "int1 sym channel",
    "mxfp4",
    "nvfp4",
    "mx6",
    "nf4 group=16 double=6x32",
    "e2m3 group=16",
    "int4 asym group=16 zero=5x32 double=4x16(sym)",
]


def program_of(text: str, shape: tuple[int, int] = (20, 64)) -> Program:
    """y = linear(x, W) with W stored as `text` says, random but for its lowest and highest codes."""
    spec = QuantSpec.parse(text)
    q = spec.quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    stored = [q.scale, *([] if q.zero_point is None else [q.zero_point]), *q.outer]
    program = Program.parse(f"def main(x: f32[batch, {shape[1]}]):\n    return {{'x': x}}")
    keys = ["codes", *(parameter.name for parameter in spec.parameters(shape))]
    nodes = [program.add_weight(f"w.{key}", t) for key, t in zip(keys, [q.codes, *stored], strict=True)]
    codes, scale, *rest = nodes
    zero = None if q.zero_point is None else rest.pop(0)
    more: dict[str, Any] = {"outer": rest} if rest else {}
    op = torch.ops.qcompile.dequantize.default
    w = program.call(op, (codes, scale, zero, str(spec), torch.float32), more, before=program.output_node, module="w")
    y = program.call(torch.ops.aten.linear.default, (program.inputs[0], w), before=program.output_node, module="w")
    program.output_node.args = ((y,),)
    program.output_names = ("y",)
    program.verify()
    return program


def data_bytes(directory: Path) -> int:
    """Bytes of the tensors in all weight files, their headers left out."""
    total = 0
    for path in directory.glob("weights-*.safetensors"):
        (header,) = struct.unpack("<Q", path.read_bytes()[:8])
        total += path.stat().st_size - 8 - header
    return total


def change(directory: Path, edit: Callable[[dict[str, Any]], None]) -> None:
    path = directory / "program.json"
    details = json.loads(path.read_text())
    edit(details)
    path.write_text(json.dumps(details))


def change_byte(directory: Path, key: str, place: int, fn: Callable[[int], int]) -> None:
    (path,) = directory.glob("weights-*.safetensors")
    data = bytearray(path.read_bytes())
    (header,) = struct.unpack("<Q", data[:8])
    start, end = json.loads(data[8 : 8 + header])[key]["data_offsets"]
    at = 8 + header + (start if place >= 0 else end) + place
    data[at] = fn(data[at])
    path.write_bytes(data)


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and a.shape == b.shape and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("text", SPECS)
def test_every_bit_comes_back_and_no_more_are_written(text: str, tmp_path: Path) -> None:
    program, spec = program_of(text), QuantSpec.parse(text)
    save_program(program, tmp_path / "once")
    loaded = load_program(tmp_path / "once")
    assert str(loaded) == str(program)
    assert all(same_bits(loaded.weights[key], program.weights[key]) for key in program.weights)
    parameters = spec.parameters((20, 64))
    numbers = [(20 * 64, spec.bits), *((torch.Size(p.shape).numel(), p.bits) for p in parameters)]
    assert data_bytes(tmp_path / "once") == sum(-(-count * bits // 8) for count, bits in numbers)
    x = torch.randn(3, 64)
    assert torch.equal(loaded.run({"x": x})["y"], program.run({"x": x})["y"])
    save_program(loaded, tmp_path / "twice")
    for path in (tmp_path / "once").glob("weights-*"):
        assert path.read_bytes() == (tmp_path / "twice" / path.name).read_bytes()


@pytest.mark.parametrize("text", SPECS)
def test_a_manifest_tells_the_bits_on_the_disk(text: str, tmp_path: Path) -> None:
    program = program_of(text)
    model = CompiledModel(program, Recipe.load("int4-g128"), CompileReport())
    model.save(tmp_path / "saved")
    manifest = load_manifest(tmp_path / "saved")
    (entry,) = manifest["tensors"].values()
    assert entry["bytes"] == data_bytes(tmp_path / "saved")
    assert entry["elements"] == 20 * 64
    assert manifest["bits_per_weight"] == manifest["quantized_bits_per_weight"] == entry["bits_per_element"]
    assert entry["bits_per_element"] == round(8 * data_bytes(tmp_path / "saved") / (20 * 64), 4)
    assert entry["spec"] == str(QuantSpec.parse(text))
    again = load(tmp_path / "saved").program
    assert all(same_bits(again.weights[key], program.weights[key]) for key in program.weights)


def load_manifest(directory: Path) -> dict[str, Any]:
    return json.loads((directory / "manifest.json").read_text())  # type: ignore[no-any-return]


def test_a_loaded_program_reads_its_codes_when_they_are_touched(tmp_path: Path) -> None:
    save_program(program_of("int3 sym group=16"), tmp_path)
    loaded = load_program(tmp_path)
    (path,) = tmp_path.glob("weights-*.safetensors")
    path.unlink()
    assert loaded.weights.meta("w.codes") == ((20, 64), torch.int8)
    with pytest.raises(FileNotFoundError):
        _ = loaded.weights["w.codes"]


def test_what_lies_packed() -> None:
    program = program_of("int4 asym group=16 scale=f16")
    found = packings(program)
    assert set(found) == {"w.codes", "w.zero_point"}
    assert (found["w.codes"].bits, found["w.codes"].signed, found["w.codes"].nbytes) == (4, True, 20 * 64 // 2)
    assert weight_parts(program) == {"w": ["w.codes", "w.scale", "w.zero_point"]}
    assert packings(program_of("int8 sym channel")) == {}
    assert not packings(program_of("int8 sym narrow channel"))["w.codes"].dense


def test_codes_that_two_readers_take_differently_stay_as_they_are(tmp_path: Path) -> None:
    text = """def main(x: f32[2, 8], *, c: i8[4, 8] = "w.codes", s: f32[4, 1] = "w.scale"):
    a: f32[4, 8] = qcompile.dequantize.default(c, s, None, "int4 sym channel")
    b: f32[4, 8] = qcompile.dequantize.default(c, s, None, "int5 sym channel")
    return {"a": a, "b": b}
"""
    program = Program.parse(text)
    assert packings(program) == {}
    assert weight_parts(program) == {"w": ["w.codes", "w.scale"]}
    save_program(program, tmp_path)
    assert torch.equal(load_program(tmp_path).weights["w.codes"], program.weights["w.codes"])


def test_codes_outside_their_spec_are_not_written(tmp_path: Path) -> None:
    program = program_of("int8 sym narrow channel")
    program.weights["w.codes"] = torch.full((20, 64), -128, dtype=torch.int8)
    with pytest.raises(SpecError, match=r"^weight 'w.codes': the value -128 lies outside -127 to 127; "):
        save_program(program, tmp_path)
    assert not (tmp_path / "program.qir").exists()


@pytest.mark.parametrize(
    ("text", "place", "fn", "message"),
    [
        ("ternary group=16", 0, lambda byte: byte & ~3 | 2, "its codes: the value -2 lies outside -1 to 1"),
        ("int8 sym narrow channel", 5, lambda byte: 128, "its codes: the value -128 lies outside -127 to 127"),
        ("int3 sym channel", -1, lambda byte: byte | 128, "followed by bits that are not 0"),
    ],
)
def test_a_changed_file_is_refused_when_it_is_read(
    text: str, place: int, fn: Callable[[int], int], message: str, tmp_path: Path
) -> None:
    odd = (5, 7) if "channel" in text else (20, 64)
    save_program(program_of(text, odd), tmp_path)
    change_byte(tmp_path, "w.codes", place, fn)
    loaded = load_program(tmp_path)
    with pytest.raises(CaptureError, match=message) as error:
        _ = loaded.weights["w.codes"]
    assert str(error.value).startswith(f"{tmp_path}: weight 'w.codes': ")
    assert "\n" not in str(error.value)


def test_a_description_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    save_program(program_of("int4 sym group=16"), tmp_path)

    def packed(**changes: Any) -> Callable[[dict[str, Any]], None]:
        return lambda details: details["packed"]["w.codes"].update(changes)

    change(tmp_path, packed(shape=[20, 63]))
    with pytest.raises(CaptureError, match=r"of 4 bits and shape \[20, 63\] takes 630 bytes, not 640"):
        load_program(tmp_path)
    change(tmp_path, packed(shape=[20, 64], lowest=-7))
    with pytest.raises(CaptureError, match=r"'w.codes' is stored as Packing.*lowest=-7.*the program reads Packing"):
        load_program(tmp_path)
    change(tmp_path, lambda details: details["packed"].pop("w.codes"))
    with pytest.raises(CaptureError, match="not a program that this version saved"):
        load_program(tmp_path)
    change(tmp_path, lambda details: details.pop("packed"))
    with pytest.raises(CaptureError, match="not a program that this version saved"):
        load_program(tmp_path)
