"""Program: looking by schema name, editing, cloning."""

from __future__ import annotations

import pytest
import torch

from qcompile.errors import VerifyError
from qcompile.ir.program import Program, identifier

aten = torch.ops.aten

TEXT = """\
def main(x: f32[batch, 4], *, w: f32[6, 4] = "a.weight", g: f32[4]):
    n: f32[batch, 4] = aten.rms_norm.default(x, [4], g)  # norm
    s: sym[batch] = aten.sym_size.int(x, 0)
    y: f32[batch, 6] = aten.linear.default(n, w)  # a
    z: f32[batch, 6] = aten.add.Tensor(y, s, alpha=2)
    return {"z": z}"""


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


def test_arguments_go_by_schema_name(program: Program) -> None:
    norm, _, linear, add = program.nodes
    w = program.weight_nodes[0]
    assert program.arg(linear, "weight") is w
    assert program.arg(linear, "bias") is None
    assert program.arg(norm, "eps") is None
    assert program.arg(norm, "normalized_shape") == [4]
    assert (program.arg(add, "alpha"), program.arg(add, "other").name) == (2, "s")
    with pytest.raises(KeyError, match=r"has no argument 'wait'; it has \['input', 'weight', 'bias'\]"):
        program.arg(linear, "wait")
    program.set_arg(norm, "eps", 0.5)
    program.set_arg(add, "alpha", 3)
    program.set_arg(linear, "input", program.inputs[0])
    program.refresh()
    assert "alpha=3" in str(program)
    assert "aten.linear.default(x, w)" in str(program)
    with pytest.raises(VerifyError, match="has no schema"):
        program.arg(program.output_node, "x")


def test_looking(program: Program) -> None:
    w, g = program.weight_nodes
    assert [n.name for n in program.inputs] == ["x"]
    assert (program.key(w), program.is_weight(w), program.is_weight(program.inputs[0])) == ("a.weight", True, False)
    assert (program.is_weight(None), program.is_weight(3)) == (False, False)
    assert program.weight(g).shape == (4,)
    assert program.weight_node("g") is g
    assert program.weight_node("nothing") is None
    (linear,) = program.calls(aten.linear.default)
    assert program.module_of(linear) == "a"
    assert program.type_of(linear) == "f32[batch, 6]"
    assert [n.name for n in program.calls(aten.add.Tensor, aten.linear.default)] == ["y", "z"]
    assert list(program.outputs) == ["z"]


def test_adding_and_replacing(program: Program) -> None:
    (linear,) = program.calls(aten.linear.default)
    bias = program.add_weight("a.bias", torch.ones(6), module="a")
    program.set_arg(linear, "bias", bias)
    relu = program.call(aten.relu.default, (linear,), after=linear)
    linear.replace_all_uses_with(relu, delete_user_cb=lambda user: user is not relu)
    program.verify()
    assert (program.module_of(relu), program.type_of(relu)) == ("a", "f32[batch, 6]")
    assert 'a_bias: f32[6] = "a.bias"' in str(program)
    with pytest.raises(KeyError, match=r"weight 'a.bias' exists already"):
        program.add_weight("a.bias", torch.ones(6))
    with pytest.raises(ValueError, match="before or after"):
        program.call(aten.relu.default, (linear,))
    gelu = program.call(aten.gelu.default, (linear,), before=relu, module="b")
    program.replace(relu, gelu)
    program.verify()
    assert not program.calls(aten.relu.default)
    assert "gelu_default: f32[batch, 6] = aten.gelu.default(y)  # b" in str(program)


def test_a_weight_of_another_shape(program: Program) -> None:
    (g,) = [n for n in program.weight_nodes if program.key(n) == "g"]
    program.set_weight(g, torch.ones(4, dtype=torch.float64))
    assert program.type_of(g) == "f64[4]"
    program.verify()


def test_a_weight_for_a_program_without_any() -> None:
    program = Program.parse('def main(x: f32[4]):\n    y = aten.neg.default(x)\n    return {"y": y}')
    weight = program.add_weight("Layer.0/W", torch.ones(4))
    program.set_arg(program.nodes[0], "self", weight)
    assert weight.name == "Layer_0_W"
    program.verify()
    assert str(Program.parse(str(program))) == str(program)


def test_refresh_drops_what_is_dead_and_infers_what_is_missing(program: Program) -> None:
    (norm,) = program.calls(aten.rms_norm.default)
    (linear,) = program.calls(aten.linear.default)
    del linear.meta["val"]
    program.replace(norm, program.inputs[0])
    program.refresh()
    program.verify()
    assert list(program.weights) == ["a.weight"]
    assert program.type_of(linear) == "f32[batch, 6]"


def test_clones_are_independent(program: Program) -> None:
    program.info["source"] = {"name": "here"}
    copy = program.clone()
    copy.info["source"]["name"] = "there"
    copy.weights.edit("g", lambda g: g * 2)
    (linear,) = copy.calls(aten.linear.default)
    copy.call(aten.neg.default, (linear,), after=linear)
    copy.refresh()
    copy.set_arg(linear, "bias", copy.add_weight("a.bias", torch.ones(6)))
    linear.meta["module"] = "elsewhere"
    assert str(program) == TEXT
    assert program.info == {"source": {"name": "here"}}
    assert not torch.equal(program.weights["g"], copy.weights["g"])
    x = torch.randn(3, 4)
    assert torch.equal(Program.parse(TEXT)(x), program(x))
    assert not torch.equal(copy(x), program(x))


@pytest.mark.parametrize(("key", "name"), [("a.b", "a_b"), ("0.w", "w_0_w"), ("_x", "_x"), ("Ä-1", "Ä_1")])
def test_identifiers(key: str, name: str) -> None:
    assert identifier(key) == name
