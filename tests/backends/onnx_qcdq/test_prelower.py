"""The rewritten program still runs and computes the same; no weight is read for it."""

from __future__ import annotations

import operator

import pytest
import torch
from onnx_programs import Layer, declare, decoder, error, products, prompt, quantized

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.prelower import prelower
from qcompile.ir import gathered
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec

WEIGHTS = {
    "grouped": "int4 sym group=16",
    "shifted": "int4 asym group=16",
    "rows": "int8 sym channel",
    "shifted_rows": "int8 asym channel",
    "unsigned": "uint8 asym channel",
    "floating": "uint4 asym group=16 zero=float",
    "three": "int3 sym tensor",
    "blocks": "int4 sym block=16x16",
    "halves": "int4 sym group=16 scale=f16",
    "floats": "e4m3fn group=16",
    "float_rows": "e5m2fnuz channel",
}
ACTIVATIONS = [
    None,
    "int8 sym token dynamic",
    "int8 sym narrow token dynamic",
    "int8 sym signed token dynamic",
    "uint8 sym token dynamic",
    "int8 asym token dynamic",
    "uint8 asym token zero=float dynamic",
    "int8 sym tensor dynamic",
    "uint8 asym tensor dynamic",
    "int8 sym group=16 dynamic",
    "int8 asym group=16 dynamic",
    "int5 sym token dynamic",
    "int8 sym token scale=f16 dynamic",
    "int8 sym tensor static",
    "int8 asym tensor static",
    "uint4 asym tensor static",
    "int8 sym channel static",
    "int8 asym channel static",
    "int8 sym token scaling_min=0.01 dynamic",
    "e4m3fn token dynamic",
    "e5m2 group=16 dynamic",
    "e4m3fnuz tensor static",
]


@pytest.mark.parametrize("style", ["fused", "qcdq"])
@pytest.mark.parametrize("activations", ACTIVATIONS)
def test_same_function(activations: str | None, style: str) -> None:
    program = products({name: Layer(spec, activations) for name, spec in WEIGHTS.items()})
    rewritten = prelower(program, style).program
    rewritten.verify()
    left = {str(node.target).partition(".")[0] for node in rewritten.nodes}
    assert "qcompile" not in left
    x = torch.randn(2, 3, 64)
    x[0, 1] = 0.0  # a token of zeros
    expected, ours = program.run({"x": x}), rewritten.run({"x": x})
    for name in expected:
        assert error(ours[name], expected[name]) < 3e-6, name


def test_weights_are_read_one_by_one_when_asked_for() -> None:
    program = quantized(decoder("llama"), "int4 sym group=32")
    reads: list[str] = []
    for key in list(program.weights):
        program.weights.edit(key, lambda tensor, key=key: (reads.append(key), tensor)[1])
    rewritten = prelower(program).program
    assert reads == []
    rewritten.weights["model.layers.0.mlp.up_proj.weight.codes@kn"]
    assert reads == ["model.layers.0.mlp.up_proj.weight.codes"]


def test_the_program_is_left_as_it_is() -> None:
    program = products({"a": Layer("int8 sym channel", "int8 sym token dynamic")})
    before, keys = str(program), set(program.weights)
    prelower(program)
    assert str(program) == before
    assert set(program.weights) == keys


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "mixtral"])
def test_decoders(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Experts are summed in one order on both sides: in another, a value between two codes may be rounded the other way.
    monkeypatch.setattr(gathered, "_pays", lambda *_: False)
    program = quantized(decoder(name), "int4 sym group=32", "int8 sym token dynamic")
    rewritten = prelower(program)
    rewritten.program.verify()
    ids = prompt()
    assert error(rewritten.program(ids), program(ids)) < 1e-5
    assert rewritten.products == {"llama": 14, "gpt2": 4, "opt": 6, "mixtral": 4}[name]


def test_readers_of_one_activation_share_its_division_but_no_quantize() -> None:
    program = products({name: Layer("int8 sym channel", "int8 sym token dynamic") for name in "abc"})
    rewritten = prelower(program).program
    divisions = [n for n in rewritten.calls(torch.ops.aten.div.Tensor) if n.args[0].name == "x"]
    assert len(divisions) == 1
    quantize = rewritten.calls(ops.QUANTIZE_LINEAR)
    assert len({node.args[1] for node in quantize}) == len(quantize) == 3


def test_a_matrix_with_bias_gets_an_axis_in_front() -> None:
    program = products(
        {"a": Layer("int8 sym channel", "int8 sym tensor static"), "b": Layer("int4 sym group=32")}, rank=2
    )
    rewritten = prelower(program).program
    assert [len(node.args[0].meta["val"].shape) for node in rewritten.calls(ops.MATMUL)] == [3, 3]
    x = torch.randn(4, 64)
    expected = program.run({"x": x})
    assert all(error(value, expected[name]) < 1e-6 for name, value in rewritten.run({"x": x}).items())


TABLE = """
def main(ids: i64[batch, sequence], *, {declared}):
    t: none = qcompile.dequantize.default(t_c, t_s, {zero}, "{spec}")
    y: none = aten.embedding.default(t, ids)
    z: none = aten.index.Tensor(t, [ids])
    return {{"y": y, "z": z}}
"""


def table(spec: str, shape: tuple[int, ...]) -> Program:
    """Rows of a quantized table of `shape`, taken twice."""
    made = QuantSpec.parse(spec).quantize(torch.randn(shape, generator=torch.Generator().manual_seed(0)))
    parts = {"c": ("t.codes", made.codes), "s": ("t.scale", made.scale)}
    if made.zero_point is not None:
        parts["z"] = ("t.zero_point", made.zero_point)
    declared = ", ".join(declare(f"t_{short}", key, tensor) for short, (key, tensor) in parts.items())
    text = TABLE.format(declared=declared, zero="t_z" if "z" in parts else "None", spec=spec).strip()
    if len(shape) > 2:  # embedding takes matrices only
        text = text.replace("y: none = aten.embedding.default(t, ids)", "y: none = aten.index.Tensor(t, [ids])")
    return Program.parse(text, dict(parts.values()))


@pytest.mark.parametrize(
    ("spec", "shape"),
    [
        ("int4 sym group=4", (10, 8)),
        ("uint4 asym group=4", (10, 8)),
        ("int8 sym group=4", (10, 8)),
        ("int8 asym channel", (10, 8)),
        ("int8 asym tensor", (10, 8)),
        ("e4m3fn channel", (10, 8)),
        ("e5m2 group=4", (10, 8)),
        ("e4m3fnuz tensor", (10, 8)),
        ("int4 sym group=4", (5, 6, 8)),
        ("int8 asym channel axis=0", (5, 6, 8)),
        ("e5m2fnuz channel axis=0,1", (5, 6, 8)),
    ],
)
def test_rows_are_gathered_before_they_are_dequantized(spec: str, shape: tuple[int, ...]) -> None:
    program = table(spec, shape)
    rewritten = prelower(program).program
    gathered = [node.args[0] for node in rewritten.calls(ops.GATHER) if node.args[0].meta["val"].ndim > 1]
    assert {str(rewritten.key(node)).partition("@")[0] for node in gathered} >= {"t.codes"}
    assert all("@nk" not in key for key in rewritten.weights)  # nothing is dequantized as a whole
    ids = torch.tensor([[0, 4, 3]])
    expected = program.run({"ids": ids})
    assert all(torch.equal(value, expected[name]) for name, value in rewritten.run({"ids": ids}).items())


def test_a_value_keeps_the_name_of_the_node_it_stands_for() -> None:
    rewritten = prelower(products({"a": Layer("int8 sym channel")}))
    (last,) = rewritten.program.outputs.values()
    assert rewritten.original[last.name] == "y_a"


def test_nothing_of_choose_qparams_is_left_behind() -> None:
    rewritten = prelower(products({"a": Layer("int4 sym group=16", "int8 asym token dynamic")})).program
    assert rewritten.calls(operator.getitem) == []
