"""Operators that only move, gather or recode the elements of a tensor, and where an axis of their result comes from."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

import qcompile.ops  # noqa: F401  registers quantize and dequantize
from qcompile.ir.program import Program
from qcompile.ir.types import Dim, dim_expr

aten = torch.ops.aten

AxisBack = Callable[[Program, fx.Node, int], int | None]
"""(program, move, axis of its result) → the axis of its source that becomes it, None where it is no single one."""


def moved(program: Program, node: fx.Node) -> fx.Node | None:
    """The node whose elements `node` moves; None where it computes something."""
    if node.op != "call_function" or node.target not in MOVES:
        return None
    source = node.args[0]
    return source if isinstance(source, fx.Node) else None


def axis_back(program: Program, node: fx.Node, axis: int) -> int | None:
    """The axis of what a move reads that becomes `axis` (from 0) of its result; None where it is no single one."""
    return MOVES[node.target](program, node, axis)


def let_reshape(program: Program, node: fx.Node) -> None:
    """Turn the views of a result into reshapes, for it may be laid out anew.

    A fused attention lays its result out as its queries are, and heads that were moved there make a view of what is
    moved back. A product does not, and values that were rounded are laid out as their shape says.
    """
    for user in node.users:
        if moved(program, user) is node:
            user.target = aten.reshape.default if user.target is aten.view.default else user.target
            let_reshape(program, user)


def readers(node: fx.Node) -> list[fx.Node]:
    """The calls that use a value, past moves."""
    found: list[fx.Node] = []
    todo = list(node.users)
    while todo:
        user = todo.pop()
        if user.target in MOVES:
            todo += user.users
        else:
            found.append(user)
    return found


def rank(node: fx.Node) -> int:
    """Number of axes of a node's value; of its parts, where it is a tuple of tensors."""
    value = node.meta["val"]
    return len(value[0].shape) if isinstance(value, (tuple, list)) else len(value.shape)


def _same(program: Program, node: fx.Node, axis: int) -> int | None:
    return axis


def _transpose(program: Program, node: fx.Node, axis: int) -> int | None:
    first, second = (int(program.arg(node, name)) % rank(node) for name in ("dim0", "dim1"))
    return {first: second, second: first}.get(axis, axis)


def _reverse(program: Program, node: fx.Node, axis: int) -> int | None:
    return rank(node) - 1 - axis


def _swap_last(program: Program, node: fx.Node, axis: int) -> int | None:
    last = rank(node) - 1
    return {last: last - 1, last - 1: last}.get(axis, axis)


def _permute(program: Program, node: fx.Node, axis: int) -> int | None:
    return int(program.arg(node, "dims")[axis]) % rank(node)


def _select(program: Program, node: fx.Node, axis: int) -> int | None:
    gone = program.arg(node, "dim") % (rank(node) + 1)
    return axis if axis < gone else axis + 1


def _index(program: Program, node: fx.Node, axis: int) -> int | None:
    """One index tensor, at position p: its axes stand where axis p stood."""
    given = [(p, index) for p, index in enumerate(program.arg(node, "indices")) if index is not None]
    if len(given) != 1:
        return None
    place, width = given[0][0], rank(given[0][1])
    if axis < place:
        return axis
    return None if axis < place + width else axis - width + 1


def _index_select(program: Program, node: fx.Node, axis: int) -> int | None:
    return None if axis == program.arg(node, "dim") % rank(node) else axis


def _unsqueeze(program: Program, node: fx.Node, axis: int) -> int | None:
    new = program.arg(node, "dim") % rank(node)
    return None if axis == new else axis - (axis > new)


def _squeeze(program: Program, node: fx.Node, axis: int) -> int | None:
    source = moved(program, node)
    assert source is not None
    if rank(source) == rank(node):
        return axis
    return axis + int(axis >= program.arg(node, "dim") % rank(source))


def _expand(program: Program, node: fx.Node, axis: int) -> int | None:
    source = moved(program, node)
    assert source is not None
    back = axis - (rank(node) - rank(source))
    return back if back >= 0 else None


def _view(program: Program, node: fx.Node, axis: int) -> int | None:
    """A view splits and merges runs of axes of equal product; an axis comes from the one source axis of its run."""
    source = moved(program, node)
    assert source is not None
    before, after = _sizes(source), _sizes(node)
    for old, new in _runs(before, after):
        if axis in new and (after[axis] != 1 or new == [axis]):
            wide = old if len(old) == 1 else [i for i in old if before[i] != 1]
            return wide[0] if len(wide) == 1 else None
    return None


def _sizes(node: fx.Node) -> list[Dim]:
    return [dim_expr(d) for d in node.meta["val"].shape]


def _runs(before: Sequence[Dim], after: Sequence[Dim]) -> list[tuple[list[int], list[int]]]:
    """Shortest runs of axes, in order, whose sizes have equal products."""
    runs: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) and j < len(after):
        old, new = [i], [j]
        left, right = sympy.sympify(before[i]), sympy.sympify(after[j])
        i, j = i + 1, j + 1
        while sympy.expand(left - right) != 0:
            if j < len(after) and (i >= len(before) or _smaller(right, left)):
                right, j = right * after[j], j + 1
                new.append(j - 1)
            elif i < len(before):
                left, i = left * before[i], i + 1
                old.append(i - 1)
            else:
                return runs
        runs.append((old, new))
    return runs


def _smaller(left: Any, right: Any) -> bool:
    """Whether `left` < `right`; for symbolic sizes, whether it divides it."""
    if left.is_number and right.is_number:
        return bool(left < right)
    return bool(sympy.fraction(sympy.cancel(right / left))[1] == 1)


MOVES: dict[Any, AxisBack] = {
    aten.transpose.int: _transpose,
    aten.t.default: _reverse,
    aten.numpy_T.default: _reverse,
    aten.mT.default: _swap_last,
    aten.permute.default: _permute,
    aten.select.int: _select,
    aten.index.Tensor: _index,
    aten.index_select.default: _index_select,
    aten.unsqueeze.default: _unsqueeze,
    aten.squeeze.dim: _squeeze,
    aten.expand.default: _expand,
    aten.view.default: _view,
    aten.reshape.default: _view,
    aten._unsafe_view.default: _view,
    aten.slice.Tensor: _same,
    aten.split.Tensor: _same,
    aten.split_with_sizes.default: _same,
    aten.chunk.default: _same,
    aten.unbind.int: _select,
    operator.getitem: _same,
    aten.to.dtype: _same,
    aten._to_copy.default: _same,
    aten.clone.default: _same,
    aten.contiguous.default: _same,
    torch.ops.qcompile.quantize.default: _same,
    torch.ops.qcompile.dequantize.default: _same,
}
