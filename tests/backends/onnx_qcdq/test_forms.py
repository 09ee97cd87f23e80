"""Which kernels onnxruntime makes of which forms, and that they compute what the program computes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Literal

import onnx
import pytest
import torch
from onnx_programs import Layer, declare, error, optimized, products

from qcompile.backends.onnx_qcdq import OnnxQcdqBackend
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN
from qcompile.recipe.model import Rule

WEIGHT_ONLY = {
    "g16": Layer("int4 sym group=16"),
    "g32": Layer("int4 asym group=32"),
    "unsigned": Layer("uint4 asym group=16"),
    "rows4": Layer("int4 sym channel", bias=False),
    "three": Layer("int3 sym group=64"),
    "rows8": Layer("int8 sym channel"),
    "grouped8": Layer("int8 asym group=16"),
    "floating": Layer("uint4 asym group=16 zero=float"),
    "halves": Layer("int4 sym group=16 scale=f16"),
    "blocks": Layer("int4 sym block=16x16"),
}
INTEGERS = {
    "token": Layer("int8 sym channel", "int8 sym token dynamic"),
    "signed": Layer("int8 sym channel", "int8 sym signed token dynamic"),
    "shifted": Layer("int8 asym channel", "int8 asym token dynamic"),
    "six": Layer("int6 sym channel", "int6 sym token dynamic"),
    "tensor": Layer("int8 sym channel", "int8 sym tensor dynamic"),
    "static": Layer("int8 sym channel", "int8 sym tensor static"),
    "static_u8": Layer("uint8 asym channel", "uint8 asym tensor static"),
    "static_4": Layer("int8 sym tensor", "uint4 asym tensor static"),
}
MIXED = {
    "w4_token": Layer("int4 sym group=16", "int8 sym token dynamic"),
    "w4_static": Layer("int4 sym group=16", "int8 asym tensor static"),
    "w4_group": Layer("int4 sym group=16", "int8 sym group=16 dynamic"),
    "w8_group": Layer("int8 sym group=16", "int8 sym token dynamic"),
}


def check(program: Program, directory: Path, backend: OnnxQcdqBackend | None = None) -> Counter[str]:
    """Lower, run, compare; returns onnxruntime's operators."""
    backend = backend or OnnxQcdqBackend()
    files = backend.lower(program, directory)
    onnx.checker.check_model(str(directory / "model.onnx"), full_check=True)
    torch.manual_seed(1)
    rank = len(program.inputs[0].meta["val"].shape)
    x = torch.randn(5, 64) if rank == 2 else torch.randn(2, 5, 64)
    expected, ours = program.run({"x": x}), backend.load(directory).run({"x": x})
    for name in expected:
        assert error(ours[name], expected[name]) < 3e-6, name
    for name, codes in backend.stored_codes(directory):
        assert torch.equal(codes, program.weights[f"{name}.codes"]), name
    written = sum(path.stat().st_size for path in directory.iterdir())
    assert sum(t.bytes for t in files.tensors) < written
    return optimized(directory)


@pytest.mark.parametrize("rank", [2, 3])
def test_weight_only_runs_on_packed_weights(rank: int, tmp_path: Path) -> None:
    program = products(WEIGHT_ONLY, rank=rank)
    count = check(program, tmp_path)
    assert count["MatMulNBits"] == len(WEIGHT_ONLY)
    assert not count["DequantizeLinear"] + count["Gemm"]


@pytest.mark.parametrize("rank", [2, 3])
def test_eight_bit_activations_run_on_integers(rank: int, tmp_path: Path) -> None:
    layers = INTEGERS | {"free": Layer("int8 sym channel", "int8 sym tensor static", bias=False)}
    count = check(products(layers, rank=rank), tmp_path)
    assert count["MatMulIntegerToFloat"] == len(layers)
    assert not count["DequantizeLinear"] + count["Gemm"] + count["MatMul"]


def test_tensor_wide_unsigned_range_is_one_kernel(tmp_path: Path) -> None:
    count = check(products({"a": Layer("int8 sym channel", "uint8 asym tensor dynamic")}), tmp_path)
    assert count == Counter(DynamicQuantizeMatMul=1, Add=1)


def test_four_bit_weights_stay_packed_behind_quantized_activations(tmp_path: Path) -> None:
    count = check(products(MIXED), tmp_path)
    assert count["MatMulNBits"] == len(MIXED)


FLOATS = {
    "rows": Layer("e4m3fn channel"),
    "grouped": Layer("e5m2 group=16"),
    "tensor": Layer("e4m3fnuz tensor scale=f16", bias=False),
    "blocks": Layer("e5m2fnuz block=16x16"),
    "behind_integers": Layer("e4m3fn channel", "int8 sym token dynamic"),
    "token": Layer("e4m3fn channel", "e4m3fn token dynamic"),
    "static": Layer("int8 sym channel", "e5m2 tensor static"),
}


def test_eight_bit_floats_are_stored_as_such(tmp_path: Path) -> None:
    check(products(FLOATS), tmp_path)
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    kind = onnx.TensorProto
    assert kinds["rows.weight.codes"] == kind.FLOAT8E4M3FN
    assert kinds["grouped.weight.codes"] == kind.FLOAT8E5M2
    assert kinds["tensor.weight.codes"] == kind.FLOAT8E4M3FNUZ
    assert kinds["blocks.weight.codes"] == kind.FLOAT8E5M2FNUZ


CONVOLUTIONS = """
def main(x: f32[batch, 64, 5], image: f32[batch, 8, 6, 6], *, a: f32[32, 64, 3], b: f32[64, 1, 4], c: f32[16, 8, 3, 3]):
    ya: none = aten.conv1d.default(x, a, None, [1], [1])  # a
    yb: none = aten.conv1d.default(x, b, None, [1], [3], [1], 64)  # b
    yc: none = aten.conv2d.default(image, c, None, [2, 2], [1, 1])  # c
    return {"ya": ya, "yb": yb, "yc": yc}"""


def test_convolutions_read_dequantized_weights(tmp_path: Path) -> None:
    program = Program.parse(CONVOLUTIONS.strip())
    rules = (Rule(match="b", weights="e4m3fn channel"), Rule(match="c", weights="int8 asym channel"))
    InsertQDQ(weights="int4 sym group=16", rules=rules).run(program)
    RTN().run(program)
    backend = OnnxQcdqBackend()
    backend.lower(program, tmp_path)
    feeds = {"x": torch.randn(2, 64, 5), "image": torch.randn(2, 8, 6, 6)}
    expected, ours = program.run(feeds), backend.load(tmp_path).run(feeds)
    assert all(error(ours[name], expected[name]) < 1e-6 for name in expected)
    codes = dict(backend.stored_codes(tmp_path))
    assert all(torch.equal(codes[name], program.weights[f"{name}.codes"]) for name in "abc")


MOVED = """
def main(x: f32[batch, 8, 16], *, {declared}):
    {body}
    turned: none = aten.transpose.int(d, 1, 2)
    flat: none = aten.flatten.using_ints(d, 1)
    y: none = aten.matmul.default(d, turned)
    return {{"y": y, "flat": flat}}"""


@pytest.mark.parametrize("style", ["fused", "qcdq"])
@pytest.mark.parametrize("spec", ["int8 sym tensor static", "int8 asym tensor static", "uint8 asym tensor static"])
def test_static_values_may_be_moved(spec: str, style: Literal["fused", "qcdq"], tmp_path: Path) -> None:
    x = torch.randn(2, 8, 16)
    made = QuantSpec.parse(spec).quantize(x)
    weights = {"s": made.scale} | ({} if made.zero_point is None else {"z": made.zero_point})
    zero = "z" if made.zero_point is not None else "None"
    body = f'q: none = qcompile.quantize.default(x, s, {zero}, "{spec}")'
    body += f'\n    d: none = qcompile.dequantize.default(q, s, {zero}, "{spec}")'
    declared = ", ".join(declare(name, name, tensor) for name, tensor in weights.items())
    program = Program.parse(MOVED.format(declared=declared, body=body).strip(), weights)
    backend = OnnxQcdqBackend(style=style)
    backend.lower(program, tmp_path)
    expected, ours = program.run({"x": x}), backend.load(tmp_path).run({"x": x})
    assert all(error(ours[name], expected[name]) < 1e-6 for name in expected)


def test_negative_scales_are_kept(tmp_path: Path) -> None:
    program = products({"a": Layer("int4 sym group=16"), "b": Layer("int8 sym channel", "int8 sym token dynamic")})
    assert all(bool((program.weights[f"{name}.weight.scale"] < 0).any()) for name in "ab")
    check(program, tmp_path)


def test_qcdq_style_writes_every_quantization_with_its_scale(tmp_path: Path) -> None:
    layers = {**INTEGERS, **{k: v for k, v in MIXED.items() if k != "w4_group"}}
    check(products(layers), tmp_path, OnnxQcdqBackend(style="qcdq"))
    graph = onnx.load(tmp_path / "model.onnx").graph
    producers = {name: node for node in graph.node for name in node.output}
    written = [n for n in graph.node if n.op_type == "DequantizeLinear" and n.input[0] in producers]
    different = {layer.activations for layer in layers.values() if "dynamic" in str(layer.activations)}
    assert len(written) == len(different) + sum("static" in str(layer.activations) for layer in layers.values())
    for node in written:
        source = producers[node.input[0]]
        clipped = source.op_type == "Clip"
        quantize = producers[source.input[0]] if clipped else source
        assert quantize.op_type == "QuantizeLinear"
        assert node.input[1] == quantize.input[1] or {node.input[1], quantize.input[1]} <= {
            i.name for i in graph.initializer
        }
    assert sum(node.op_type == "Clip" and node.output[0] in {n.input[0] for n in written} for node in graph.node) == 2


@pytest.mark.parametrize("opset", [23, 25])
def test_later_opsets(opset: int, tmp_path: Path) -> None:
    layers = {
        "two": Layer("int2 sym group=16"),
        "uns": Layer("uint2 asym group=16"),
        "ter": Layer("ternary sym channel"),
    }
    layers |= {"four": WEIGHT_ONLY["g16"], "eight": INTEGERS["token"]}
    program = products(layers)
    check(program, tmp_path, OnnxQcdqBackend(opset=opset))
    kinds = {i.name: i.data_type for i in onnx.load(tmp_path / "model.onnx").graph.initializer}
    two, four = onnx.TensorProto, onnx.TensorProto.INT4
    assert kinds["two.weight.codes"] == (two.INT2 if opset == 25 else four)
    assert kinds["four.weight.codes"] == four


def test_bits_are_those_of_the_bytes(tmp_path: Path) -> None:
    layers = {
        k: replace(v, bias=False) for k, v in WEIGHT_ONLY.items() if k in ("g16", "g32", "rows8", "halves", "three")
    }
    files = OnnxQcdqBackend(external_data_threshold=0).lower(products(layers), tmp_path)
    bits = {t.name: t.bits_per_element for t in files.tensors}
    assert bits == {
        "g16.weight": 4 + 32 / 16,
        "g32.weight": 4 + 36 / 32,
        "three.weight": 4 + 32 / 64,
        "rows8.weight": 8 + 32 / 64,
        "halves.weight": 4 + 16 / 16,
    }
    assert {t.name: t.container for t in files.tensors}["g32.weight"] == "int4"
    assert (tmp_path / "model.onnx.data").stat().st_size == sum(t.bytes for t in files.tensors)
