"""Remove calls that return what they were given.

    c = to.dtype(x, f32); y = to.dtype(c, bf16)     ⟶     x                (x is bf16: widening loses nothing)
    t = transpose(x, 1, 2); y = transpose(t, 1, 2)  ⟶     x
    y = slice(x, 1, 0, 9223372036854775807)         ⟶     x

Exact: equal values, shape and dtype (of the two zeros, ``x + 0`` kept only the positive one). Where a dropped call made
a copy, each ``view`` behind it becomes a ``reshape``, up to the next product of matrices: operators hand on the order
of their operand's elements in memory, and the copy's order is what made the ``view`` possible.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr
from qcompile.pass_base import Pass, Report, register

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class DropIdentities(Pass):
    """Remove slices of everything, views to the same shape, cancelling transposes, casts to the same dtype, ⋯"""

    name: ClassVar[str] = "drop-identities"

    def run(self, program: Program) -> Report:
        """Replace each identity by its operand."""
        report = Report()
        loosened: set[fx.Node] = set()  # what works on any order in memory by now
        for node in program.nodes:
            found = _identity(program, node)
            if found is None:
                continue
            source, why = found
            if any(user.op == "output" for user in node.users) and source.op == "placeholder":
                report.skip(node, f"{why}, but it is what returns {source.name}")
                continue
            if node.target in _COPIES:
                behind, obstacle = _behind(node, loosened)
                if obstacle is not None:
                    report.skip(node, f"{why}, but {obstacle.name} needs the memory layout that it makes")
                    continue
                loosened |= behind
                for view in behind:
                    if view.target in _VIEWS:
                        view.target = aten.reshape.default
            program.replace(node, source)
            report.rewrote(node, why)
        return report


def _identity(program: Program, node: fx.Node) -> tuple[fx.Node, str] | None:
    """The node that `node` equals, and why; None where it does something."""
    check = _CHECKS.get(node.target)
    return None if check is None else check(program, node)


Found = tuple[fx.Node, str] | None


def _always(program: Program, node: fx.Node) -> Found:
    source = _operand(node)
    return source, "a copy of its operand"


def _dropout(program: Program, node: fx.Node) -> Found:
    if program.arg(node, "train") and program.arg(node, "p") != 0:
        return None
    return program.arg(node, "input"), "dropout that drops nothing"


def _same_shape(program: Program, node: fx.Node) -> Found:
    """Views keep the order of elements, so the same shape is the same tensor, however many views lie between."""
    source = node.args[0]
    while isinstance(source, fx.Node):
        if _shape(source) == _shape(node):
            return source, "the shape it has already"
        if source.target not in _VIEWS or node.target not in _VIEWS:
            return None
        source = source.args[0]
    return None


def _slice(program: Program, node: fx.Node) -> Found:
    source = _operand(node)
    if program.arg(node, "start") in (None, 0) and _shape(source) == _shape(node):
        return source, "a slice of everything"
    return None


def _permutation(node: fx.Node) -> list[int] | None:
    """The permutation of axes that a call makes; None where it makes none."""
    rank = node.meta["val"].ndim if isinstance(node.meta["val"], Tensor) else 0
    axes = list(range(rank))
    if node.target is aten.permute.default:
        return [axis % rank for axis in node.args[1]]  # type: ignore[union-attr, operator, misc]
    if node.target is aten.transpose.int:
        i, j = (int(axis) for axis in node.args[1:3])  # type: ignore[arg-type]
        axes[i], axes[j] = axes[j], axes[i]
        return axes
    if node.target in (aten.t.default, aten.numpy_T.default):
        return axes[::-1]
    return None


def _permute(program: Program, node: fx.Node) -> Found:
    source, axes = _operand(node), _permutation(node)
    assert axes is not None
    if axes == sorted(axes):
        return source, "axes in the order they have"
    first = _permutation(source)
    if first is not None and [first[axis] for axis in axes] == sorted(axes):
        below = _operand(source)
        return below, f"undoes {source.name}"
    return None


def _squeeze(program: Program, node: fx.Node) -> Found:
    source = _operand(node)
    opposite = {aten.squeeze.dim: aten.unsqueeze.default, aten.unsqueeze.default: aten.squeeze.dim}[node.target]  # type: ignore[index]
    if source.target is opposite:
        below = _operand(source)
        wide = source if node.target is aten.squeeze.dim else node  # the one with the axis of size one
        rank = wide.meta["val"].ndim
        if program.arg(node, "dim") % rank == program.arg(source, "dim") % rank and _shape(below) == _shape(node):
            return below, f"undoes {source.name}"
    return None


def _neutral(element: int) -> Callable[[Program, fx.Node], Found]:
    def check(program: Program, node: fx.Node) -> Found:
        sides = [node.args[0], node.args[1]]
        if node.target in (aten.mul.Tensor, aten.add.Tensor):
            sides.sort(key=lambda side: not isinstance(side, fx.Node))
        source, other = sides
        if not isinstance(source, fx.Node) or not isinstance(other, (int, float)) or other != element:
            return None
        return (source, f"{node.target} with {other}") if _same_type(source, node) else None

    return check


def _cast(program: Program, node: fx.Node) -> Found:
    source, dtype = _operand(node), node.meta["val"].dtype
    if source.meta["val"].dtype == dtype:
        return source, "the dtype it has already"
    below = source.args[0] if source.target in _CASTS else None
    if not isinstance(below, fx.Node) or below.meta["val"].dtype != dtype or not _floats(below, source):
        return None
    if torch.promote_types(dtype, source.meta["val"].dtype) != source.meta["val"].dtype:
        return None
    return below, f"undoes {source.name}, which lost nothing"


def _single(program: Program, node: fx.Node) -> Found:
    tensors = node.args[0]
    if isinstance(tensors, (list, tuple)) and len(tensors) == 1 and isinstance(tensors[0], fx.Node):
        return tensors[0], "a concatenation of one"
    return None


def _operand(node: fx.Node) -> fx.Node:
    operand = node.args[0]
    assert isinstance(operand, fx.Node)
    return operand


def _floats(*nodes: fx.Node) -> bool:
    return all(n.meta["val"].dtype.is_floating_point for n in nodes)


def _shape(node: fx.Node) -> list[Any] | None:
    value = node.meta["val"]
    return [dim_expr(d) for d in value.shape] if isinstance(value, Tensor) else None


def _same_type(a: fx.Node, b: fx.Node) -> bool:
    return isinstance(a.meta["val"], Tensor) and _shape(a) == _shape(b) and a.meta["val"].dtype == b.meta["val"].dtype


def _behind(node: fx.Node, known: set[fx.Node]) -> tuple[set[fx.Node], fx.Node | None]:
    """All that `node`'s order in memory may show through to, beyond `known`; and one of them that would not work on
    any other order, if there is one."""
    found: set[fx.Node] = set()
    pending = [node]
    while pending:
        for user in pending.pop().users:
            if user.op != "call_function" or user in found or user in known:
                continue
            if _needs_layout(user):
                return set(), user
            found.add(user)
            if user.target not in _FRESH:
                pending.append(user)
    return found, None


def _needs_layout(node: fx.Node) -> bool:
    """Views of bits, and kernels outside ATen's public operators, may insist on strides."""
    if not isinstance(node.target, OpOverload) or node.target in _ANY_LAYOUT:
        return False
    name = node.target._schema.name.partition("::")[2]
    private = name.startswith("_") and not name.startswith("__")  # __and__ and its like are Python's operators
    foreign = node.target.namespace not in ("aten", "qcompile") or private
    return foreign or "as_" in name or node.target is aten.view.dtype


_VIEWS = {aten.view.default, aten.reshape.default, aten._unsafe_view.default}
_ANY_LAYOUT = {aten._softmax.default, aten._log_softmax.default, aten._to_copy.default, *_VIEWS}
# What writes its result in rows, whatever the order of its operands.
_FRESH = {
    aten.linear.default,
    aten.mm.default,
    aten.addmm.default,
    aten.bmm.default,
    aten.baddbmm.default,
    aten.embedding.default,
}
_CASTS = {aten.to.dtype, aten._to_copy.default}
# What makes a new tensor where the operand may have had gaps or another order in memory.
_COPIES = {
    aten.clone.default,
    aten.contiguous.default,
    aten.add.Tensor,
    aten.sub.Tensor,
    aten.mul.Tensor,
    aten.div.Tensor,
    aten.cat.default,
    aten.concat.default,
    aten.repeat.default,
    *_VIEWS,
}
_CHECKS: dict[Any, Callable[[Program, fx.Node], Found]] = {
    aten.clone.default: _always,
    aten.contiguous.default: _always,
    aten.alias.default: _always,
    aten.detach.default: _always,
    aten.lift_fresh_copy.default: _always,
    aten.dropout.default: _dropout,
    aten.feature_dropout.default: _dropout,
    aten.view.default: _same_shape,
    aten.reshape.default: _same_shape,
    aten._unsafe_view.default: _same_shape,
    aten.expand.default: _same_shape,
    aten.broadcast_to.default: _same_shape,
    aten.repeat.default: _same_shape,
    aten.slice.Tensor: _slice,
    aten.permute.default: _permute,
    aten.transpose.int: _permute,
    aten.t.default: _permute,
    aten.numpy_T.default: _permute,
    aten.squeeze.dim: _squeeze,
    aten.unsqueeze.default: _squeeze,
    aten.add.Tensor: _neutral(0),
    aten.sub.Tensor: _neutral(0),
    aten.mul.Tensor: _neutral(1),
    aten.div.Tensor: _neutral(1),
    aten.to.dtype: _cast,
    aten._to_copy.default: _cast,
    aten.cat.default: _single,
    aten.concat.default: _single,
}
