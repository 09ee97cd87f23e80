"""What programs are rewritten to computes what they compute, in torch."""

from __future__ import annotations

import pytest
import torch
from mlir_programs import error, llama, products, prompt, quantized

import qcompile
from qcompile.backends.torch_mlir import TorchMlirBackend, ops
from qcompile.backends.torch_mlir.prelower import prelower
from qcompile.cli import takers
from qcompile.ir.program import Program
from qcompile.numerics.families import FAMILIES
from qcompile.numerics.spec import QuantSpec
from qcompile.zoo import path

WEIGHTS = {
    "g16": "int4 sym group=16",
    "g32": "int4 asym group=32",
    "unsigned": "uint4 asym group=16 zero=float",
    "two": "int2 asym group=32",
    "three": "int3 sym group=16",
    "rows8": "int8 sym channel",
    "whole": "int8 asym tensor",
    "halves": "int4 sym group=16 scale=f16",
    "blocks": "int4 sym block=16x16",
    "doubled": "int4 asym group=16 double=8x32",
    "columns": "int8 sym group=16 axis=0",
    "nf4": "nf4 group=32",
    "fp8": "e4m3fn channel",
    "mx": "mxfp4",
    "mx8": "mxfp8_e4m3",
    "nv": "nvfp4",
    "mx6": "mx6",
    "bfp": "bfp16",
}
INTEGERS = {
    "token": ("int8 sym channel", "int8 sym token dynamic"),
    "shifted": ("int8 asym channel", "int8 asym token dynamic"),
    "unsigned": ("uint8 asym channel", "uint8 asym token dynamic"),
    "narrow": ("int4 sym channel", "int6 sym token dynamic"),
    "tensor": ("int8 sym tensor", "int8 sym tensor dynamic"),
}
MIXED = {
    "w4_token": ("int4 sym group=16", "int8 sym token dynamic"),
    "w8_group": ("int8 sym channel", "int8 sym group=16 dynamic"),
}


def agrees(program: Program, rewritten: Program) -> None:
    rewritten.verify()
    torch.manual_seed(1)
    x = torch.randn(2, 5, 64)
    expected, ours = program.run({"x": x}), rewritten.run({"x": x})
    for name in expected:
        assert error(ours[name], expected[name]) < 2e-6, name


@pytest.mark.parametrize("packing", ["packed", "unpacked"])
def test_weights_in_every_format(packing: str) -> None:
    program = products({name: (spec, None) for name, spec in WEIGHTS.items()})
    assert TorchMlirBackend().obstacles(program) == []
    found = prelower(program, packing)  # type: ignore[arg-type]
    assert len(found.program.calls(ops.LINEAR)) == len(WEIGHTS)
    agrees(program, found.program)


def test_every_format_that_is_taken() -> None:
    for text in (text for family in FAMILIES for text in family.specs):
        spec = QuantSpec.parse(text)
        for use in takers.uses(spec):
            if takers.reasons(spec, use)["torch_mlir"]:
                continue
            make = takers._with_weight if use == "weight" else takers._with_activation
            program = make(spec)
            found = prelower(program, "packed").program
            shape = [int(d) if isinstance(d, int) else 3 for d in program.inputs[0].meta["val"].shape]
            x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
            assert error(found.run({"x": x})["y"], program.run({"x": x})["y"]) < 3e-6, text


def test_integers_are_summed_as_integers() -> None:
    program = products(INTEGERS | MIXED)
    found = prelower(program, "packed")
    assert (found.products, found.integer_products) == (len(INTEGERS | MIXED), len(INTEGERS))
    assert len(found.program.calls(ops.INTEGER_LINEAR)) == len(INTEGERS)
    agrees(program, found.program)


def test_rows_of_tables_and_what_iree_miscompiles() -> None:
    program = qcompile.compile(str(path("moe")), {"weights": "int4 sym group=32"}).program
    found = prelower(program, "packed").program
    assert len(found.calls(ops.ROWS)) == 6  # two stacks of experts in each of three layers
    assert not found.calls(torch.ops.aten.topk.default)
    assert error(found(prompt()), program(prompt())) < 2e-6


def test_the_program_stays_as_it_is() -> None:
    program = quantized(llama(), "int4 sym group=16")
    before = str(program)
    prelower(program, "packed")
    assert str(program) == before


def test_obstacles_are_named() -> None:
    def reasons(layers: dict[str, tuple[str, str | None]]) -> list[str]:
        return [str(o) for o in TorchMlirBackend().obstacles(products(layers))]

    assert "int1 to int8 here, not to e4m3fn" in reasons({"a": ("int8 sym channel", "e4m3fn token dynamic")})[0]
    assert "module a" in reasons({"a": ("int8 sym channel", "e4m3fn token dynamic")})[0]
    assert "drop via=" in reasons({"a": ("int4 sym group=16 via=e4m3fn", None)})[0]
    half = Program.parse(
        "def main(x: f16[2, 4], *, w: f16[6, 4]):\n    y = aten.linear.default(x, w)\n    return {'y': y}"
    )
    assert "capture the model with dtype=float32" in str(TorchMlirBackend().obstacles(half)[0])


def test_operators_that_iree_does_not_know_are_named_with_their_module(iree: None) -> None:
    text = "def main(x: f32[4, 4]):\n    y = aten.linalg_eigvalsh.default(x)  # some.module\n    return {'y': y}"
    found = TorchMlirBackend().obstacles(Program.parse(text))
    assert [o.module for o in found] == ["some.module"]
    assert "not in IREE's torch dialect" in found[0].reason


def test_results_of_other_types_are_named() -> None:
    text = "def main(x: f32[4, 4]):\n    y = aten.fft_fft.default(x)  # some.module\n    return {'y': y}"
    found = [str(o) for o in TorchMlirBackend().obstacles(Program.parse(text))]
    assert found == [
        "y (module some.module): aten.fft_fft.default gives torch.complex64, which modules do not compute with; leave "
        "that part out"
    ]
