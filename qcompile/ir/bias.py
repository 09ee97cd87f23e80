"""Adding a vector to what a product with a weight gives: to its bias, or to one that it gets."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction
from qcompile.ir.program import Program

aten = torch.ops.aten


def bias_argument(c: Contraction) -> str | None:
    """The schema name of a product's bias; None where its operator has none."""
    names = {a.name for a in c.node.target._schema.arguments}  # type: ignore[union-attr]
    return "bias" if "bias" in names else "self" if c.op == "addmm" else None


def add_to_bias(program: Program, c: Contraction, gain: Tensor) -> str:
    """Add `gain` ``[output features]`` to the result of a product; says how.

    To the bias where it is a weight that nothing else reads, computed in float64 and rounded once; else as a bias where
    the operator takes one and has none; else by an addition behind it.
    """
    name = bias_argument(c)
    held = None if name is None else program.arg(c.node, name)
    if isinstance(held, fx.Node) and program.is_weight(held) and len(held.users) == 1:
        old = program.weight(held)
        program.set_weight(held, (old.double() + gain.double().expand_as(old)).to(old.dtype))
        return f"{program.key(held)}: corrected"
    key = f"{program.key(c.weight).removesuffix('.weight')}.bias"
    while key in program.weights:
        key += "_"
    bias = program.add_weight(key, gain.to(c.node.meta["val"].dtype), module=program.module_of(c.node))
    if name == "bias" and held is None:
        program.set_arg(c.node, name, bias)
        return f"{key}: added"
    users = list(c.node.users)
    shape = [-1] + [1] * (len(c.node.meta["val"].shape) - 1 - c.output_axis)
    wide = bias if len(shape) == 1 else program.call(aten.view.default, (bias, shape), after=c.node)
    added = program.call(aten.add.Tensor, (c.node, wide), after=wide if wide is not bias else c.node)
    for user in users:
        user.replace_input_with(c.node, added)
    return f"{key}: added behind it"
