"""Every attention of a program, found by what the graph computes and never by a name.

    scores = q · kᵀ · scale, capped, biased, masked;  weights = softmax(scores);  context = weights · v

either as one `aten.scaled_dot_product_attention`, or spelled out: a softmax whose logits come from one product of two
activations and which reaches a product with a third one along the axis that it runs over.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.ir.contractions import Obstacle, constants, short_name
from qcompile.ir.moves import MOVES, axis_back, moved, rank
from qcompile.ir.products import labels_of
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr

aten = torch.ops.aten

FUSED = aten.scaled_dot_product_attention.default
SOFTMAXES = (aten.softmax.int, aten._softmax.default, aten._safe_softmax.default)

# Schema names of what is multiplied, and for each of the two: the axis summed over, its own axis, and where that is in
# the result; all from the end.
_Sides = tuple[tuple[str, int, int, int], tuple[str, int, int, int]]


def _sides(left: str, right: str) -> _Sides:
    return (left, -1, -2, -2), (right, -2, -1, -1)


_MATMULS: dict[Any, _Sides] = {
    aten.matmul.default: _sides("self", "other"),
    aten.mm.default: _sides("self", "mat2"),
    aten.addmm.default: _sides("mat1", "mat2"),
    aten.bmm.default: _sides("self", "mat2"),
    aten.baddbmm.default: _sides("batch1", "batch2"),
    aten.linear.default: (("input", -1, -2, -2), ("weight", -1, -2, -1)),
}
# Element by element: an axis of the result, counted from the end, is that axis of each operand.
_ELEMENTWISE = {
    *(aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor, aten.div.Scalar, aten.neg.default, aten.dropout.default),
    *(aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.masked_fill.Scalar, aten.masked_fill.Tensor),
    *(aten.clamp.default, aten.clamp_min.default, aten.clamp_max.default, aten.nan_to_num.default),
}
_BEFORE_SOFTMAX = _ELEMENTWISE | {
    *(aten.add.Tensor, aten.add.Scalar, aten.sub.Tensor, aten.sub.Scalar, aten.tanh.default),
    *(aten.maximum.default, aten.minimum.default, aten.max.other, aten.min.other),
}
_REPEATS = {aten.repeat.default, aten.repeat_interleave.self_int}
# Moves that an operand is not followed through: what they read is another tensor than the one that is multiplied.
_BARRIERS = {
    *(aten.select.int, aten.index.Tensor, aten.index_select.default, operator.getitem),
    *(torch.ops.qcompile.quantize.default, torch.ops.qcompile.dequantize.default),
}


@dataclass(frozen=True)
class Operand:
    """What a product reads, and where that is best quantized.

    `source` is the smallest tensor that `path` only repeats (grouped queries), transposes, reshapes or casts to a wider
    type before it is read; ``[batch, heads, tokens, features]`` where there is such a one. `path` is in program order.
    """

    node: fx.Node  # what is read: the last of `path`, or `source`
    reader: fx.Node  # the product, or the fused operator
    argument: str  # schema name of the reader's argument
    index: int | None  # and the place in it, where it is a list
    source: fx.Node
    path: tuple[fx.Node, ...]
    tokens: int  # axes of `source`, from 0; those of attention weights are queries and keys
    features: int


@dataclass(frozen=True)
class Attention:
    """One attention: `context` is the fused operator, or the product of attention weights with values.

    The fused operator has `scores`, `softmax` and `weights` inside: they are None. `weights` are the softmax as the
    second product reads it: without the column of a sink, masked again or dropped out where the model does that.
    """

    module: str
    query: Operand
    key: Operand
    value: Operand
    scores: fx.Node | None
    softmax: fx.Node | None
    weights: Operand | None
    context: fx.Node


def find_attention(program: Program) -> list[Attention]:
    """Every attention, in program order of `context`."""
    return [found for found in survey_attention(program) if isinstance(found, Attention)]


def find_attention_obstacles(program: Program) -> list[Obstacle]:
    """Products of two activations that are part of no attention, each with the reason.

    >>> text = "def main(x: f32[2, 4], y: f32[4, 3]):\\n    z = aten.mm.default(x, y)\\n    return {'z': z}"
    >>> find_attention_obstacles(Program.parse(text))[0].reason
    'a product of two activations with no softmax before or behind it'
    """
    return [found for found in survey_attention(program) if isinstance(found, Obstacle)]


def survey_attention(program: Program) -> list[Attention | Obstacle]:
    """Every attention and every obstacle, in program order."""
    constant = constants(program)
    pairs = {node: pair for node in program.nodes if (pair := _pair(program, node, constant)) is not None}
    found: list[tuple[fx.Node, Attention | Obstacle]] = []
    for softmax in program.calls(*SOFTMAXES):
        found += _spelled(program, softmax, pairs)
    taken = {node for node, _ in found} | {f.scores for _, f in found if isinstance(f, Attention)}
    for node in program.nodes:
        if node.target is FUSED:
            found.append((node, _fused(program, node)))
        elif isinstance(node.target, OpOverload) and "attention" in node.target._schema.name:
            reason = f"{short_name(node)} is attention fused in another way than scaled_dot_product_attention"
            found.append((node, Obstacle(node, reason)))
        elif node in pairs and node not in taken:
            pair = pairs[node]
            reason = (
                pair if isinstance(pair, str) else "a product of two activations with no softmax before or behind it"
            )
            found.append((node, Obstacle(node, reason)))
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    return [entry for _, entry in sorted(found, key=lambda f: order[f[0]])]


@dataclass(frozen=True)
class _Side:
    """One of the two tensors of a product; axes from 0."""

    node: fx.Node
    argument: str
    index: int | None
    summed: int
    own: int  # the last axis that the other lacks
    result: int  # and where that is in the result


_Pair = tuple[_Side, _Side]


def _pair(program: Program, node: fx.Node, constant: set[fx.Node]) -> _Pair | str | None:
    """The two activations that `node` multiplies; why they are not told apart; None where it is no such product."""
    if node.target is aten.einsum.default:
        return _einsum(program, node, constant)
    if (matmul := _MATMULS.get(node.target)) is None:
        return None
    tensors = [program.arg(node, argument) for argument, *_ in matmul]
    if any(t in constant or rank(t) < 2 for t in tensors):
        return None
    left, right = (
        _Side(tensor, argument, None, summed % rank(tensor), own % rank(tensor), result % rank(node))
        for tensor, (argument, summed, own, result) in zip(tensors, matmul, strict=True)
    )
    return left, right


def _einsum(program: Program, node: fx.Node, constant: set[fx.Node]) -> _Pair | str | None:
    tensors, equation = list(program.arg(node, "tensors")), str(program.arg(node, "equation")).replace(" ", "")
    if any(t in constant or rank(t) < 2 for t in tensors) or len(tensors) < 2:
        return None
    if len(tensors) > 2:
        return f"einsum {equation!r} multiplies {len(tensors)} tensors at once"
    labels = labels_of(equation, [rank(t) for t in tensors])
    if isinstance(labels, str):
        return labels
    sides, result = [], labels[2]
    for index, (mine, other) in enumerate(((labels[0], labels[1]), (labels[1], labels[0]))):
        summed = [a for a in mine if a in other and a not in result]
        own = [a for a in mine if a not in other]
        if len(summed) != 1 or not own or any(a not in result for a in own):
            return f"einsum {equation!r} has not one summed axis and one of each operand's own"
        places = mine.index(summed[0]), mine.index(own[-1]), result.index(own[-1])  # before it: heads the other shares
        sides.append(_Side(tensors[index], "tensors", index, *places))
    return sides[0], sides[1]


def _fused(program: Program, node: fx.Node) -> Attention:
    def operand(name: str) -> Operand:
        tensor = program.arg(node, name)
        return _operand(program, node, tensor, (name, None), tokens=rank(tensor) - 2, features=rank(tensor) - 1)

    query, key, value = operand("query"), operand("key"), operand("value")
    return Attention(program.module_of(node), query, key, value, None, None, None, node)


def _spelled(
    program: Program, softmax: fx.Node, pairs: Mapping[fx.Node, _Pair | str]
) -> list[tuple[fx.Node, Attention | Obstacle]]:
    """Each attention at its context, or each obstacle at its product; nothing where no product feeds the softmax."""
    along = int(program.arg(softmax, "dim")) % rank(softmax)
    logits = _logits(program, program.arg(softmax, "self"), along, pairs)
    contexts = _contexts(program, softmax, along, pairs)
    if not logits:
        return []
    (scores, axis), *more = logits.items()
    pair = pairs[scores]
    reason = None
    if more:
        names = ", ".join(node.name for node in logits)
        reason = f"softmax {softmax.name} takes a sum of {len(logits)} products of activations: {names}"
    elif isinstance(pair, str):
        reason = pair
    elif axis not in (pair[0].result, pair[1].result):
        reason = f"softmax {softmax.name} runs over no axis that the product made"
    elif not contexts:
        reason = f"softmax {softmax.name} of it reaches no product that sums over what the softmax runs over"
    if reason is not None or isinstance(pair, str):
        return [(node, Obstacle(node, str(reason))) for node in logits]
    query, key = pair if pair[1].result == axis else pair[::-1]
    return [(node, _attention(program, softmax, scores, (query, key, *sides), node)) for node, sides in contexts]


def _attention(
    program: Program, softmax: fx.Node, scores: fx.Node, sides: tuple[_Side, _Side, _Side, _Side], context: fx.Node
) -> Attention:
    def operand(reader: fx.Node, side: _Side, tokens: int, features: int) -> Operand:
        return _operand(program, reader, side.node, (side.argument, side.index), tokens=tokens, features=features)

    query, key, weights, value = sides
    return Attention(
        program.module_of(context),
        operand(scores, query, query.own, query.summed),
        operand(scores, key, key.own, key.summed),
        operand(context, value, value.summed, value.own),
        scores,
        softmax,
        operand(context, weights, weights.own, weights.summed),
        context,
    )


def _logits(program: Program, node: fx.Node, axis: int, pairs: Mapping[fx.Node, _Pair | str]) -> dict[fx.Node, int]:
    """The products that are added up in `node`, each with the axis of it that is `axis` of `node`."""
    found: dict[fx.Node, int] = {}
    seen, todo = {node}, [(node, axis)]
    while todo:
        node, axis = todo.pop()
        if node in pairs:
            found[node] = axis
            continue
        for source, back in _sources(program, node, axis):
            if source not in seen:
                seen.add(source)
                todo.append((source, back))
    return found


def _sources(program: Program, node: fx.Node, axis: int) -> Iterator[tuple[fx.Node, int]]:
    """What `node` scales, adds, masks, caps, joins or moves, with the axis that becomes `axis`."""
    if node.target is aten.cat.default:
        yield from ((source, axis) for source in program.arg(node, "tensors"))
    elif node.target in _BEFORE_SOFTMAX:
        for source in node.all_input_nodes:
            value = source.meta["val"]
            back = axis - rank(node) + rank(source) if isinstance(value, Tensor) else -1
            if back >= 0 and value.dtype != torch.bool:
                yield source, back
    elif (moves := moved(program, node)) is not None and (place := axis_back(program, node, axis)) is not None:
        yield moves, place


def _contexts(
    program: Program, softmax: fx.Node, axis: int, pairs: Mapping[fx.Node, _Pair | str]
) -> list[tuple[fx.Node, tuple[_Side, _Side]]]:
    """The products that sum over `axis` of `softmax`, with the side of the weights and that of the values."""
    found: list[tuple[fx.Node, tuple[_Side, _Side]]] = []
    seen, todo = {softmax}, [(softmax, axis)]
    while todo:
        node, axis = todo.pop()
        for user in node.users:
            pair = pairs.get(user)
            if isinstance(pair, tuple):
                for weights, value in (pair, pair[::-1]):
                    if weights.node is node and weights.summed == axis:
                        found.append((user, (weights, value)))
            elif user not in seen and pair is None:
                seen.add(user)
                todo += [(user, place) for place in _onward(program, user, node, axis)]
    return found


def _onward(program: Program, user: fx.Node, node: fx.Node, axis: int) -> list[int]:
    """The axis of `user` that is `axis` of `node`, where it masks, scales or moves it."""
    if user.target in _ELEMENTWISE:
        return [axis + rank(user) - rank(node)]
    if moved(program, user) is not node or not isinstance(user.meta["val"], Tensor):
        return []
    return [place for place in range(rank(user)) if axis_back(program, user, place) == axis]


def _operand(
    program: Program, reader: fx.Node, node: fx.Node, place: tuple[str, int | None], *, tokens: int, features: int
) -> Operand:
    """Follow what `reader` reads back to where it is best quantized."""
    trail = _trail(program, node, tokens, features)

    def cost(step: int) -> tuple[Any, ...]:
        here, tokens, features = trail[step]
        last = rank(here) - 1
        share = _elements(here) / _elements(node)
        return (share if share.is_number else math.inf, features != last, tokens != last - 1, rank(here) != 4, -step)

    best = min(range(len(trail)), key=cost)
    path = tuple(here for here, *_ in reversed(trail[:best]))
    source, tokens, features = trail[best]
    return Operand(node, reader, *place, source, path, tokens, features)


def _trail(program: Program, node: fx.Node, tokens: int, features: int) -> list[tuple[fx.Node, int, int]]:
    """`node` and, one after the other, what it is moved from as a whole, with the two axes there."""
    trail = [(node, tokens, features)]
    while (source := _whole(program, node)) is not None:
        backs = [_axis_in(program, node, source, axis) for axis in (tokens, features)]
        if any(
            back is None or _size(source, back) != _size(node, axis)
            for back, axis in zip(backs, (tokens, features), strict=True)
        ):
            break
        node, (tokens, features) = source, backs  # type: ignore[assignment]
        trail.append((node, tokens, features))
    return trail


def _whole(program: Program, node: fx.Node) -> fx.Node | None:
    """What `node` moves, repeats or casts to a wider type, all of it; None where it does not."""
    repeats = node.target in _REPEATS or (node.target is aten.dropout.default and not program.arg(node, "train"))
    source = node.args[0] if repeats else moved(program, node)
    if not isinstance(source, fx.Node) or node.target in _BARRIERS or not isinstance(source.meta["val"], Tensor):
        return None
    old, new = source.meta["val"].dtype, node.meta["val"].dtype
    if not old.is_floating_point or torch.promote_types(old, new) != new:
        return None
    if node.target is aten.slice.Tensor and any(_size(source, axis) != _size(node, axis) for axis in range(rank(node))):
        return None
    return source


def _axis_in(program: Program, node: fx.Node, source: fx.Node, axis: int) -> int | None:
    if node.target is aten.repeat.default:
        return axis - rank(node) + rank(source)
    return axis if node.target not in MOVES else axis_back(program, node, axis)


def _size(node: fx.Node, axis: int) -> Any:
    return dim_expr(node.meta["val"].shape[axis]) if axis >= 0 else None


def _elements(node: fx.Node) -> Any:
    return math.prod((sympy.sympify(dim_expr(d)) for d in node.meta["val"].shape), start=sympy.Integer(1))
