"""The text that programs become, without a compiler."""

from __future__ import annotations

import pytest
import torch
from mlir_programs import llama, products

from qcompile.backends.torch_mlir.emit import Entry, Naming, emit_module, operator_name
from qcompile.backends.torch_mlir.kernels import CONTAINER
from qcompile.backends.torch_mlir.prelower import prelower
from qcompile.backends.torch_mlir.weights import read, stored
from qcompile.errors import LoweringError
from qcompile.ir.program import Program

aten = torch.ops.aten


def text_of(program: Program, entry: Entry | None = None, locations: bool = False) -> str:
    naming = Naming(scope=lambda n: "model", key=program.key, symbol=lambda n: n.name)
    return emit_module(program, [entry or Entry("main")], naming, "model", locations)


def test_a_module() -> None:
    program = Program.parse(
        "def main(x: f32[batch, 4], *, w: f32[6, 4]):\n"
        "    y = aten.linear.default(x, w)\n"
        "    z = aten.add.Tensor(y, 0.5)\n"
        "    return {'z': z}"
    )
    assert text_of(program) == (
        "module @model {\n"
        '  util.global private @w = #flow.parameter.named<"model"::"w"> : tensor<6x4xf32>\n'
        "  func.func @main(%arg0: !torch.vtensor<[?,4],f32>) -> (!torch.vtensor<[?,6],f32>) {\n"
        "    %0 = util.global.load @w : tensor<6x4xf32>\n"
        "    %1 = torch_c.from_builtin_tensor %0 : tensor<6x4xf32> -> !torch.vtensor<[6,4],f32>\n"
        '    %2 = "torch.constant.none"() : () -> !torch.none\n'
        '    %3 = "torch.aten.linear"(%arg0, %1, %2) : (!torch.vtensor<[?,4],f32>, !torch.vtensor<[6,4],f32>, '
        "!torch.none) -> !torch.vtensor<[?,6],f32>\n"
        '    %4 = "torch.constant.float"() {value = 0x3FE0000000000000 : f64} : () -> !torch.float\n'
        '    %5 = "torch.constant.int"() {value = 1 : i64} : () -> !torch.int\n'
        '    %6 = "torch.aten.add.Scalar"(%3, %4, %5) : (!torch.vtensor<[?,6],f32>, !torch.float, !torch.int) -> '
        "!torch.vtensor<[?,6],f32>\n"
        "    return %6 : !torch.vtensor<[?,6],f32>\n"
        "  }\n"
        "}\n"
    )


def test_an_entry_fixes_sizes_and_operators_say_where_they_come_from() -> None:
    program = prelower(llama(layers=1), "packed").program
    names = {name: symbol for symbol, name in program.symbols.items()}
    text = text_of(program, Entry("decode", {names["batch"]: 1, names["sequence"]: 1}), locations=True)
    assert "@decode(%arg0: !torch.vtensor<[1,1],si64>" in text
    assert 'loc("linear (module model.layers.0.self_attn.q_proj)")' in text


def test_packed_codes_are_globals_of_narrow_integers() -> None:
    layers = {
        "four": ("int4 sym group=16", None),
        "two": ("int2 asym group=32", None),
        "three": ("int3 sym group=16", None),
    }
    program = prelower(products(layers), "packed").program
    text = text_of(program)
    assert '@four_weight_codes = #flow.parameter.named<"model"::"four.weight.codes"> : tensor<48x4x16xi4>' in text
    assert "tensor<48x2x32xi2>" in text
    assert 'three_weight_codes = #flow.parameter.named<"model"::"three.weight.codes"> : tensor<48x4x16xi4>' in text
    unpacked = text_of(prelower(products(layers), "unpacked").program)
    assert "xi4>" not in unpacked
    assert "xi2>" not in unpacked


def test_bytes_are_those_of_the_containers() -> None:
    layers = {"four": ("int4 sym group=16", None), "two": ("int2 asym group=32", None)}
    for packing, sizes in (("packed", (48 * 32, 48 * 16)), ("unpacked", (48 * 64, 48 * 64))):
        program = prelower(products(layers), packing).program  # type: ignore[arg-type]
        codes = [n for n in program.weight_nodes if CONTAINER in n.meta]
        items = [stored(n, program.key(n)) for n in codes]
        assert tuple(item.nbytes for item in items) == sizes
        assert all(read(program, item).numel() == item.nbytes for item in items)


def test_what_has_no_form_is_named() -> None:
    with pytest.raises(LoweringError, match="no operator of the torch dialect"):
        operator_name(len)
    assert operator_name(aten.__and__.Tensor) == "torch.aten.bitwise_and.Tensor"
    assert operator_name(aten.sym_size.int) == "torch.aten.size.int"
