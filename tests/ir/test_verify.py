"""Every rule of the verifier is broken by a small program and caught by that rule."""

from __future__ import annotations

import operator
from collections.abc import Callable

import pytest
import torch
from torch import fx

from qcompile.errors import VerifyError
from qcompile.ir.program import Program
from qcompile.ir.verify import RULES

aten = torch.ops.aten

TEXT = """\
def main(x: f32[batch, 4], *, w: f32[6, 4], t: f32[6]):
    p: tuple[f32[6, 2], f32[0]] = qcompile.choose_qparams.default(w, "int4 sym group=2")
    s: f32[6, 2] = operator.getitem(p, 0)
    q: i8[6, 4] = qcompile.quantize.default(w, s, None, "int4 sym group=2")
    v: i8[6, 4] = aten.view.default(q, [6, 4])
    d: f32[6, 4] = qcompile.dequantize.default(v, s, None, "int4 sym group=2")
    d2: f32[6, 4] = qcompile.dequantize.default(q, s, None, "int4 sym group=2")
    m: f32[6, 4] = aten.add.Tensor(d, d2)
    y: f32[batch, 6] = aten.linear.default(x, m, t)
    return {"y": y, "d": d, "s": s, "v": v}"""

Break = Callable[[Program], None]
BREAKS: dict[str, list[Break]] = {}


def breaks(rule: str) -> Callable[[Break], Break]:
    def add(function: Break) -> Break:
        BREAKS.setdefault(rule, []).append(function)
        return function

    return add


def _node(program: Program, name: str) -> fx.Node:
    return next(n for n in program.graph.nodes if n.name == name)


def _like(program: Program, name: str, target: object, args: tuple[object, ...], before: str = "y") -> fx.Node:
    """Insert a call that claims the value of the node `name`, without inference."""
    with program.graph.inserting_before(_node(program, before)):
        node = program.graph.call_function(target, args)  # type: ignore[arg-type]
    node.meta.update(val=_node(program, name).meta["val"], module="")
    return node


@breaks("structure")
def _a_get_attr(program: Program) -> None:
    with program.graph.inserting_before(_node(program, "y")):
        program.graph.create_node("get_attr", "somewhere")


@breaks("structure")
def _read_before_computed(program: Program) -> None:
    _node(program, "y").prepend(_node(program, "p"))


@breaks("structure")
def _late_placeholder(program: Program) -> None:
    with program.graph.inserting_before(_node(program, "y")):
        program.graph.placeholder("late").meta.update(val=_node(program, "x").meta["val"])


@breaks("structure")
def _no_output(program: Program) -> None:
    program.graph.erase_node(program.output_node)


@breaks("structure")
def _call_after_output(program: Program) -> None:
    program.output_node.append(_like(program, "x", aten.neg.default, (_node(program, "x"),)))


@breaks("weights-first")
def _input_before_weights(program: Program) -> None:
    _node(program, "w").prepend(_node(program, "x"))


@breaks("operators")
def _a_python_function(program: Program) -> None:
    new = _like(program, "x", torch.nn.functional.relu, (_node(program, "x"),))
    program.set_arg(_node(program, "y"), "input", new)


@breaks("operators")
def _a_packet(program: Program) -> None:
    new = _like(program, "x", aten.relu, (_node(program, "x"),))
    program.set_arg(_node(program, "y"), "input", new)


@breaks("functional")
def _in_place(program: Program) -> None:
    new = _like(program, "x", aten.relu_.default, (_node(program, "x"),))
    program.set_arg(_node(program, "y"), "input", new)


@breaks("values")
def _no_value(program: Program) -> None:
    del _node(program, "d").meta["val"]


@breaks("bound")
def _not_in_the_store(program: Program) -> None:
    del program.weights["w"]


@breaks("bound")
def _other_shape(program: Program) -> None:
    program.weights["w"] = torch.ones(6, 5)


@breaks("bound")
def _other_dtype(program: Program) -> None:
    program.weights["w"] = torch.ones(6, 4, dtype=torch.float64)


@breaks("bound")
def _two_placeholders(program: Program) -> None:
    _node(program, "t").meta["weight"] = "w"
    program.weights["w"] = torch.ones(6, 4)


@breaks("named-outputs")
def _same_name_twice(program: Program) -> None:
    program.output_names = ("y", "y", "s", "v")


@breaks("named-outputs")
def _too_many_names(program: Program) -> None:
    program.output_names = ("y", "d", "s", "v", "z")


@breaks("alive")
def _dead_call(program: Program) -> None:
    program.call(aten.neg.default, (_node(program, "x"),), before=_node(program, "y"))


@breaks("getitem")
def _item_of_a_tensor(program: Program) -> None:
    program.set_arg(_node(program, "y"), "bias", _like(program, "t", operator.getitem, (_node(program, "t"), 0)))


@breaks("getitem")
def _item_out_of_range(program: Program) -> None:
    program.set_arg(_node(program, "y"), "bias", _like(program, "t", operator.getitem, (_node(program, "p"), 2)))


@breaks("getitem")
def _negative_item(program: Program) -> None:
    program.set_arg(_node(program, "y"), "bias", _like(program, "t", operator.getitem, (_node(program, "p"), -1)))


@breaks("codes-decoded")
def _computing_with_codes(program: Program) -> None:
    program.set_arg(_node(program, "m"), "self", _like(program, "d", aten.neg.default, (_node(program, "q"),), "m"))


@breaks("codes-decoded")
def _computing_with_moved_codes(program: Program) -> None:
    program.set_arg(_node(program, "m"), "self", _like(program, "d", aten.abs.default, (_node(program, "v"),), "m"))


@breaks("codes-made")
def _decoding_floats(program: Program) -> None:
    program.set_arg(_node(program, "d"), "codes", _node(program, "w"))


@breaks("blocks-divide")
def _scale_of_another_rank(program: Program) -> None:
    for name in ("q", "d", "d2"):
        program.set_arg(_node(program, name), "scale", _node(program, "t"))


@breaks("blocks-divide")
def _scale_that_does_not_divide(program: Program) -> None:
    three = program.add_weight("three", torch.ones(6, 3))
    for name in ("q", "d", "d2"):
        program.set_arg(_node(program, name), "scale", three)


@breaks("pair-agrees")
def _another_spec(program: Program) -> None:
    program.set_arg(_node(program, "d2"), "spec", "int8 sym group=2")


@breaks("pair-agrees")
def _another_scale(program: Program) -> None:
    program.set_arg(_node(program, "d2"), "scale", program.add_weight("other", torch.ones(6, 2)))


def test_the_program_is_fine_to_begin_with() -> None:
    Program.parse(TEXT).verify()


@pytest.mark.parametrize(("rule", "function"), [(r, f) for r, fs in BREAKS.items() for f in fs])
def test_rule_catches(rule: str, function: Break) -> None:
    program = Program.parse(TEXT)
    function(program)
    with pytest.raises(VerifyError, match=rf"\(rule '{rule}': .*; see docs/ir.md#rules\)"):
        program.verify()


def test_every_rule_is_broken_here() -> None:
    names = [rule.name for rule in RULES]
    assert sorted(BREAKS) == sorted(names)
    assert len(set(names)) == len(names)
