"""Operators that work on each element alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout, plain
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.broadcast import Pair, paired, row_numbers
from qcompile.spaces.walk import Triple, Walk, sizes
from qcompile.spaces.wires import EVERY, MIXING, VECTOR, Level

aten = torch.ops.aten
_DIVISIONS = (aten.div.Tensor, aten.divide.Tensor, aten.true_divide.Tensor)
NOT_MIXED = (Level.DIAGONAL, *VECTOR)  # permutations pass


@rule(
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten._to_copy.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.alias.default,
    aten.lift_fresh_copy.default,
    says="x and casts: everything passes",
)
def identity(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    if not node.meta["val"].dtype.is_floating_point:
        walk.stop(layout, node, "becomes integers")
        return plain(sizes(node))
    return layout


@rule(
    aten.neg.default,
    says="−x: everything passes; where it is a part of a vector, that is no longer mixed with the rest",
)
def negated(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    walk.only(layout, node)
    return layout


@rule(aten.dropout.default, aten.feature_dropout.default, says="x outside training: everything passes")
def dropout(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return walk.barrier(node, "draws at random") if walk.program.arg(node, "train") else walk.of(node.args[0])


@rule(
    aten.silu.default,
    aten.gelu.default,
    aten.tanh.default,
    aten.sigmoid.default,
    aten.exp.default,
    aten.log.default,
    aten.softplus.default,
    aten.elu.default,
    aten.mish.default,
    aten.hardswish.default,
    aten.hardsigmoid.default,
    aten.relu6.default,
    aten.erf.default,
    aten.sin.default,
    aten.cos.default,
    aten.rsqrt.default,
    aten.sqrt.default,
    aten.reciprocal.default,
    aten.abs.default,
    aten.square.default,
    aten.pow.Tensor_Scalar,
    aten.clamp.default,
    aten.clamp_max.default,
    aten.log1p.default,
    aten.expm1.default,
    aten.nan_to_num.default,
    aten.log_sigmoid.default,
    says="a function of each element: permutations pass, nothing else",
)
def nonlinear(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    walk.stop(layout, node, f"{_name(node)} bends each element", NOT_MIXED)
    walk.only(layout, node, (Level.PERMUTATION,))
    return Layout(layout.axes, layout.ids, layout.varies)


@rule(
    aten.relu.default,
    aten.leaky_relu.default,
    says="relu: positive diagonals and permutations pass",
)
def relu(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    walk.stop(layout, node, f"{_name(node)} bends each element", VECTOR)
    walk.only(layout, node, (Level.PERMUTATION,))
    return layout


@rule(aten.clamp_min.default, says="max(x, 0) is relu; any other bound is a function of each element")
def clamp_min(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return relu(walk, node) if walk.program.arg(node, "min") == 0 else nonlinear(walk, node)


@rule(
    aten.add.Tensor,
    aten.add.Scalar,
    aten.sub.Tensor,
    aten.sub.Scalar,
    aten.subtract.Tensor,
    aten.rsub.Scalar,
    says="x ± y: both move by the same T; a bias is one more source; what has no source to move forbids everything",
)
def add(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        return _shift(walk, node, first if isinstance(first, fx.Node) else second)
    constant = first in walk.constants, second in walk.constants
    return summed(walk, node, walk.of(first), walk.of(second), constant)


def summed(
    walk: Walk, node: fx.Node, a: Layout, b: Layout, constant: tuple[bool, bool] = (False, False)
) -> Layout | list[Layout]:
    """Layouts of tensors that are added, element by element."""
    pair = paired(a, b)
    if pair is None:
        return walk.barrier(node, "adds tensors whose merged axes do not line up")
    if _lost(walk, node, a, b, constant):
        return pair.layout(np.full([1] * pair.a.ndim, -1))
    if a.zero or b.zero:
        kept = pair.b if a.zero else pair.a
        return Layout(pair.axes, kept, pair.b_varies if a.zero else pair.a_varies)
    if not a.has_wires and not b.has_wires:
        return pair.layout(pair.a if pair.a.size >= pair.b.size else pair.b)
    wide_a, wide_b = np.broadcast_arrays(pair.a, pair.b)
    walk.wires.join(wide_a, wide_b)
    walk.wires.same_copy(wide_a, wide_b)
    event = walk.wires.event(node, "adds what no weight makes")
    for wired, other, varies in ((wide_a, wide_b, pair.b_varies), (wide_b, wide_a, pair.a_varies)):
        levels = NOT_MIXED if (other < 0).all() and _blind(wired, varies) else EVERY
        walk.wires.limit(levels, np.where(other < 0, wired, -1), event)
    event = walk.wires.event(node, "sum")
    walk.wires.together(MIXING, pair.a, event)
    walk.wires.together(MIXING, pair.b, event, 1)
    walk.wires.part(pair.a, event, 0)
    walk.wires.part(pair.b, event, 1)
    if (pair.a < 0).any() or (pair.b < 0).any():
        return pair.layout(np.where(wide_a >= 0, wide_a, wide_b))
    smaller = pair.b if (constant[0] or pair.b.size < pair.a.size) and pair.b.size <= pair.a.size else pair.a
    return pair.layout(smaller)


def _blind(ids: Ids, varies: tuple[bool, ...]) -> bool:
    """Whether a tensor that varies so is the same for all wires of one vector: a permutation does not notice it."""
    return not any(v and size > 1 for v, size in zip(varies, ids.shape, strict=True))


def _flags(ids: Ids, varies: tuple[bool, ...]) -> list[bool]:
    return [v or s > 1 for v, s in zip(varies, ids.shape, strict=True)]


def _spread(a: Ids, b: Ids) -> bool:
    """Whether a single wire of `a`, a gate for a whole head, meets all wires of a vector of `b`."""
    if not (a >= 0).any() or not (b >= 0).any():
        return False
    wired = [i for i, size in enumerate(b.shape) if size > 1]
    return bool(wired) and a.shape[wired[-1]] == 1


def _shift(walk: Walk, node: fx.Node, tensor: Any) -> Layout:
    """A number is added to every element."""
    layout = walk.of(tensor)
    numbers = [a for a in node.args[:2] if not isinstance(a, fx.Node)]
    if node.target is aten.rsub.Scalar or numbers != [0]:
        walk.stop(layout, node, "adds a number to each element", NOT_MIXED)
        walk.only(layout, node, (Level.PERMUTATION,))
    return Layout(layout.axes, layout.ids, layout.varies)


@rule(
    aten.mul.Tensor,
    aten.mul.Scalar,
    aten.multiply.Tensor,
    aten.div.Tensor,
    aten.div.Scalar,
    aten.divide.Tensor,
    aten.true_divide.Tensor,
    says="x · number, x · a factor per token: everything passes; x · γ: T = diag(d) moves to γ, permutations act on"
    " both; x · y: a diagonal on one factor passes to the product, permutations act on both; x · a table that differs"
    " along the channels (a rotary embedding): diagonals pass",
)
def multiply(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    first, second = node.args[:2]
    if not isinstance(first, fx.Node) or not isinstance(second, fx.Node):
        if not isinstance(first, fx.Node) and node.target in _DIVISIONS:
            return nonlinear(walk, node)
        layout = walk.of(first if isinstance(first, fx.Node) else second)
        walk.only(layout, node)
        return layout
    a, b = walk.of(first), walk.of(second)
    if node.target in _DIVISIONS and b.has_wires:
        return walk.barrier(node, "divides by what the channels hold")
    return scaled(walk, node, a, b, (first in walk.constants, second in walk.constants))


def scaled(
    walk: Walk, node: fx.Node, a: Layout, b: Layout, constant: tuple[bool, bool] = (False, False)
) -> Layout | list[Layout]:
    """Layouts of tensors that are multiplied, element by element."""
    pair = paired(a, b)
    if pair is None:
        return walk.barrier(node, "multiplies tensors whose merged axes do not line up")
    if _lost(walk, node, a, b, constant):
        return pair.layout(np.full([1] * pair.a.ndim, -1))
    pair = _by_tokens(walk, node, pair, a, b)
    if a.zero or b.zero:
        walk.stop(a, node, "is multiplied by zero")
        return Layout(pair.axes, np.full([1] * pair.a.ndim, -1), pair.layout(pair.a).varies, zero=True)
    for one, other, layout in ((pair.a, pair.b, a), (pair.b, pair.a, b)):
        if _spread(one, other):
            walk.stop(layout, node, "one element multiplies several")
            flags = tuple(_flags(one, pair.a_varies if one is pair.a else pair.b_varies))
            return _by_table(walk, node, pair, other, flags)
    if not b.has_wires:
        return _by_table(walk, node, pair, pair.a, pair.b_varies)
    if not a.has_wires:
        return _by_table(walk, node, pair, pair.b, pair.a_varies)
    return _gate(walk, node, pair, constant)


def _lost(walk: Walk, node: fx.Node, a: Layout, b: Layout, constant: tuple[bool, bool]) -> bool:
    """Whether a constant, such as frequencies times positions, goes into a value that no weight makes."""
    for mine, other, fixed in ((a, b, constant[0]), (b, a, constant[1])):
        if fixed and mine.has_wires and not other.has_wires and not other.zero:
            walk.stop(mine, node, "goes into values that no weight makes")
            return True
    return False


def _by_tokens(walk: Walk, node: fx.Node, pair: Pair, a: Layout, b: Layout) -> Pair:
    """Wires that differ along tokens only on one side, a table of positions, move alike for all tokens."""
    ids = [pair.a, pair.b]
    if not a.has_wires or not b.has_wires:
        return pair
    for k, (mine, other, layout) in enumerate(((pair.a, pair.b, b), (pair.b, pair.a, a))):
        tokens = [i for i, (m, o) in enumerate(zip(mine.shape, other.shape, strict=True)) if o == 1 < m]
        flat = [size for axis in layout.axes for size in axis]
        lead = mine.ndim - len(flat)
        for i in tokens:
            if i >= lead and flat[i - lead] != 1:
                ids[k] = walk.collapsed(ids[k], i, node)
    return Pair(pair.axes, ids[0], ids[1], pair.a_varies, pair.b_varies)


def _by_table(walk: Walk, node: fx.Node, pair: Pair, ids: Ids, varies: tuple[bool, ...]) -> Layout:
    """Wires times values that depend on none: where those differ from channel to channel, T may not mix them."""
    result = pair.layout(ids)
    inner = tuple(v and s > 1 for v, s in zip(varies, ids.shape, strict=True))
    if any(inner):
        walk.rows(result, node, "multiplies each channel by another number", row_numbers(ids, inner))
    else:
        walk.only(result, node)
    return result


def _gate(walk: Walk, node: fx.Node, pair: Pair, constant: tuple[bool, bool]) -> Layout:
    a, b = np.broadcast_arrays(pair.a, pair.b)
    if constant[0] and not constant[1]:
        a, b, constant = b, a, (False, True)
    both = (a >= 0) & (b >= 0)
    leader = np.where(a >= 0, a, b)
    out = walk.wires.beside(leader)
    walk.wires.same_copy(leader, out)
    walk.wires.join(a, out, (Level.PERMUTATION,))
    walk.wires.join(b, out, (Level.PERMUTATION,))
    weight = "its gain scales each channel" if constant[1] else "multiplies channel by channel"
    event = walk.wires.event(node, weight)
    for ids in (a, b, out):
        walk.wires.limit(VECTOR, ids, event)
        walk.wires.together((Level.PERMUTATION,), ids, event)
    walk.wires.part(pair.a, event, 0)
    walk.wires.part(pair.b, event, 1)
    walk.triples.append(Triple(a[both], b[both], out[both], event))
    alone = (leader >= 0) & ~both
    walk.wires.join(leader[alone], out[alone], (Level.DIAGONAL,))
    walk.wires.limit((Level.PERMUTATION,), leader[alone], event)
    return pair.layout(out)


@rule(
    aten.where.self,
    aten.where.ScalarOther,
    aten.where.ScalarSelf,
    says="a choice by a mask of tokens: as x + y; by a mask that differs along the channels: diagonals only",
)
def where(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    condition = walk.of(node.args[0])
    if condition.has_wires:
        return walk.barrier(node, "chooses by what the channels hold")
    parts: list[Layout] = []
    for side in node.args[1:3]:
        if isinstance(side, fx.Node):
            layout = scaled(walk, node, walk.of(side), condition)
            assert isinstance(layout, Layout)
            parts.append(layout)
        else:
            parts.append(plain([1] * condition.rank, zero=bool(side == 0)))
    return summed(walk, node, parts[0], parts[1])


@rule(
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    says="x where a mask lets it: as a product with the mask where the rest becomes 0",
)
def masked_fill(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout, mask = walk.of(node.args[0]), walk.of(node.args[1])
    if mask.has_wires:
        return walk.barrier(node, "is masked by what the channels hold")
    if node.args[2] != 0:
        walk.stop(layout, node, "is filled with a number", NOT_MIXED)
        walk.only(layout, node, (Level.PERMUTATION,))
    return scaled(walk, node, layout, mask)


def _name(node: fx.Node) -> str:
    return str(node.target).split(".")[1] if "." in str(node.target) else str(node.target)
