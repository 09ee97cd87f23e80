"""Products: an activation with a weight, where spaces end and start, and two activations with each other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
import torch.utils._pytree as pytree
from torch import fx

from qcompile.ir.contractions import Contraction
from qcompile.ir.moves import rank
from qcompile.ir.program import Program
from qcompile.ir.types import Dim
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout, along
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.indexing import wires_along
from qcompile.spaces.rules.pairing import Operand, multiplied
from qcompile.spaces.rules.pointwise import summed
from qcompile.spaces.walk import Use, Walk, sizes
from qcompile.spaces.wires import MIXING, VECTOR, Level

aten = torch.ops.aten
CASTS = (aten.to.dtype, aten._to_copy.default, aten.clone.default, aten.contiguous.default)
_QUANTIZED = {
    torch.ops.qcompile.quantize.default,
    torch.ops.qcompile.dequantize.default,
    torch.ops.qcompile.choose_qparams.default,
}
_ADDS: dict[Any, str] = {
    aten.addmm.default: "self",
    aten.baddbmm.default: "self",
}  # what other products call their bias


PRODUCTS = (
    *(aten.linear.default, aten.mm.default, aten.addmm.default, aten.matmul.default, aten.bmm.default),
    *(aten.baddbmm.default, aten._grouped_mm.default, aten.einsum.default),
)
CONVOLUTIONS = (
    *(aten.conv1d.default, aten.conv1d.padding, aten.conv2d.default, aten.conv2d.padding),
    *(aten.conv3d.default, aten.conv3d.padding, aten.convolution.default),
    *(aten.conv_transpose1d.default, aten.conv_transpose2d.input, aten.conv_transpose3d.input),
)


@rule(
    *PRODUCTS,
    says="x · W: x's space ends in a sink (W ← W·T⁻¹) and a new one starts at a source (W ← T·W, b ← T·b), any T; a"
    " stack of experts shares one T. x · y of activations, summed over tokens: y's channels pass; summed over channels:"
    " x and y are paired, T and T⁻ᵀ",
)
@rule(
    *CONVOLUTIONS,
    says="a linear on its channel axis; in groups: what it reads has one T for all of them, what it makes one for each;"
    " channel by channel (depthwise): diagonals and permutations pass",
)
def contract(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    found = walk.contractions.get(node)
    if found is not None:
        return _contraction(walk, node, found)
    if node in walk.obstacles:
        return walk.barrier(node, walk.obstacles[node])
    if node.target in CONVOLUTIONS:
        return walk.barrier(node, "convolves two activations")
    return _activations(walk, node)


def _contraction(walk: Walk, node: fx.Node, c: Contraction) -> Layout | list[Layout]:
    if any(step.target in _QUANTIZED for step in c.path):
        return walk.barrier(node, "its weight is quantized already")
    layout = walk.of(c.input)
    rows = wires_along(walk, node, layout, c.input_axis)
    if rows is None:
        return walk.barrier(node, "sums over channels and tokens at once")
    shape = c.weight.meta["val"].shape
    depthwise = c.groups > 1 and shape[c.axis_in] == 1 and rows.shape[1] == c.groups == shape[c.axis_out]
    if layout.has_wires and rows.shape[1] > 0:
        grouped = c.groups > 1 and not depthwise
        if grouped:  # the matrices of all groups stand side by side, over one axis of inputs
            rows = rows.reshape(len(rows) * c.groups, -1)
        places = None if depthwise or grouped else part_of(walk.program, c, c.axis_in, rows.shape[1])
        if isinstance(places, str):
            return walk.barrier(node, places)
        _sink(walk, node, c, rows, depthwise, places)
    places = part_of(walk.program, c, c.axis_out, sizes(node)[c.output_axis])
    if isinstance(places, str):
        return walk.barrier(node, places)
    result = source(walk, node, c.weight, c.axis_out, c.output_axis, places)
    if c.groups > 1 and not depthwise:
        size = result.ids.size // c.groups
        rows = (np.arange(result.ids.size) // size).reshape(result.ids.shape)
        walk.rows(result, node, f"convolves {c.groups} groups of channels, each with its own weight", rows)
    if depthwise and layout.has_wires:
        _channelwise(walk, node, rows[0], result)
    bias = _bias(walk, node)
    return result if bias is None else summed(walk, node, result, _at(walk.of(bias), c.output_axis, result))


def _bias(walk: Walk, node: fx.Node) -> fx.Node | None:
    """What a product adds."""
    names = {a.name for a in node.target._schema.arguments}  # type: ignore[union-attr]
    name = _ADDS.get(node.target, "bias" if "bias" in names else "")
    bias = walk.program.arg(node, name) if name else None
    return bias if isinstance(bias, fx.Node) else None


def _at(bias: Layout, axis: int, result: Layout) -> Layout:
    """A bias of one axis stands along the output features, which need not be the last axis."""
    if bias.rank != 1 or axis == result.rank - 1:
        return bias
    for _ in range(result.rank - 1 - axis):
        bias = bias.inserted(bias.rank)
    return bias


def part_of(program: Program, c: Contraction, axis: int, size: Dim) -> Ids | str | None:
    """Where along an axis of the stored weight the part that is read lies, ``[copies, size]``: several copies where one
    of many experts is chosen when the model runs. None for the whole axis; else why it is not known."""
    width = int(c.weight.meta["val"].shape[axis])
    if size == width:
        return None
    numbers = torch.arange(width).reshape([-1 if i == axis else 1 for i in range(rank(c.weight))])
    value: Any = numbers.expand(c.weight.meta["val"].shape)
    for step in c.path:
        rest = (*step.args[1:], *step.kwargs.values())
        if step.target is aten.index.Tensor and _picks_one_of_many(step):
            continue  # the axis that is chosen from stays: all of its entries move alike
        if any(isinstance(a, fx.Node) for a in pytree.tree_leaves(rest)):
            return f"reads a part of {program.key(c.weight)!r} that is chosen when the model runs"
        value = value if step.target in CASTS else step.target(value, *step.args[1:], **step.kwargs)  # type: ignore[operator]
    read = [i for i in range(value.ndim) if value.shape[i] == size and _differs(value, i)]
    if len(read) != 1:
        return f"reads {program.key(c.weight)!r} in parts that are no part of one axis"
    return np.unique(value.movedim(read[0], -1).reshape(-1, int(size)).numpy(), axis=0)


def _picks_one_of_many(step: fx.Node) -> bool:
    given = [i for i in step.args[1] if i is not None]  # type: ignore[union-attr]
    return len(given) == 1 and isinstance(given[0], fx.Node) and rank(given[0]) == 1


def _differs(value: torch.Tensor, axis: int) -> bool:
    first = value.select(axis, 0).unsqueeze(axis)
    return bool((value != first).any())


def _whole(walk: Walk, row: Ids, places: Ids | None, width: int) -> Ids:
    """Wires along the whole axis of a weight, of which `places` are read: each of several copies is a vector."""
    if places is None:
        return row
    ids = np.full(width, -1, np.int64)
    if len(places) == 1:
        ids[places[0]] = row
        return ids
    copies = walk.wires.fresh(np.broadcast_to(np.arange(len(places))[:, None], places.shape))
    walk.wires.join(copies, np.broadcast_to(row, places.shape))
    ids[places] = np.where(row >= 0, copies, -1)
    return ids


def _sink(walk: Walk, node: fx.Node, c: Contraction, rows: Ids, depthwise: bool, places: Ids | None) -> None:
    """Every row of wires meets the same weight, so all rows move alike."""
    if (rows < 0).any() and (rows >= 0).any():
        event = walk.wires.event(node, "reads channels beside values that no weight makes")
        some = (rows >= 0).any(0)
        walk.wires.limit(
            (Level.PERMUTATION, Level.DIAGONAL, *VECTOR), np.where(rows.min(0) < 0, rows, -1)[:, some], event
        )
    if len(rows) > 1:
        walk.wires.join(rows[:1], rows[1:])
        walk.wires.together(MIXING, rows, walk.wires.event(node, "rows of one weight"), np.arange(len(rows))[:, None])
    if depthwise:
        walk.uses.append(Use("sink", node, rows[0], c.weight, c.axis_out, levels=(Level.DIAGONAL,)))
        walk.share(c.weight, "sink", c.axis_out, rows[0])
        return
    ids = _whole(walk, rows[0], places, int(c.weight.meta["val"].shape[c.axis_in]))
    walk.share(c.weight, "sink", c.axis_in, ids)
    walk.use(Use("sink", node, ids, c.weight, c.axis_in))


def _channelwise(walk: Walk, node: fx.Node, row: Ids, result: Layout) -> None:
    out = result.ids.ravel()
    walk.wires.join(row, out, (Level.PERMUTATION,))
    event = walk.wires.event(node, "convolves each channel with a weight of its own")
    walk.wires.limit(VECTOR, row, event)
    walk.wires.limit(VECTOR, out, event)


def source(
    walk: Walk, node: fx.Node, weight: fx.Node, axis: int, output_axis: int, places: Ids | None = None
) -> Layout:
    """The layout of a result that starts at one axis of a weight, or at some places of it."""
    width = int(weight.meta["val"].shape[axis])
    ids = walk.wires.fresh(np.zeros(width if places is None else places.shape[1], np.int64))
    whole = _whole(walk, ids, places, width)
    walk.use(Use("source", node, whole, weight, axis))
    walk.share(weight, "source", axis, whole)
    return along(sizes(node), output_axis, ids)


def _activations(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    operands = _operands(walk, node)
    if isinstance(operands, str):
        return walk.barrier(node, operands)
    left, right, out, added = operands
    result = multiplied(walk, node, left, right, out)
    if added is not None and isinstance(result, Layout):
        return summed(walk, node, result, walk.of(added))
    return result


def _operands(walk: Walk, node: fx.Node) -> tuple[Operand, Operand, list[str], fx.Node | None] | str:
    """Both operands with a label for each axis, the labels of the result, and what is added to it."""
    if node.target is aten.einsum.default:
        return _einsum(walk, node)
    tensors = [n for n in node.args if isinstance(n, fx.Node)]
    added = tensors[0] if node.target in (aten.addmm.default, aten.baddbmm.default) else None
    left, right = tensors[1:3] if added is not None else tensors[:2]
    if node.target is aten._grouped_mm.default:
        return "multiplies tokens by a stack of activations"
    ranks = rank(left), rank(right)
    if min(ranks) < 1:
        return "multiplies a number"
    batch = [f"b{i}" for i in reversed(range(max(*ranks, 2) - 2))]
    a = ["k"] if ranks[0] == 1 else [*batch[len(batch) - (ranks[0] - 2) :], "m", "k"]
    b = ["k"] if ranks[1] == 1 else [*batch[len(batch) - (ranks[1] - 2) :], "k", "n"]
    if node.target is aten.linear.default:
        b = ["n", "k"]
    out = [*batch, *(["m"] if ranks[0] > 1 else []), *(["n"] if ranks[1] > 1 else [])]
    return Operand(walk.of(left), a), Operand(walk.of(right), b), out, added


def _einsum(walk: Walk, node: fx.Node) -> tuple[Operand, Operand, list[str], fx.Node | None] | str:
    from qcompile.ir.products import labels_of

    tensors = list(walk.program.arg(node, "tensors"))
    if len(tensors) != 2:
        return "multiplies more than two tensors"
    labels = labels_of(str(walk.program.arg(node, "equation")).replace(" ", ""), [rank(t) for t in tensors])
    if isinstance(labels, str):
        return labels
    a, b, out = labels
    return Operand(walk.of(tensors[0]), a), Operand(walk.of(tensors[1]), b), out, None
