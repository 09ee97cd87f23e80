"""How a tensor that is split over ranks comes out of an operator: along which axis, and which runs of it each rank has.

    linear rows         [b, s, H·D]  split along the last axis, each rank some heads
    view                [b, s, H, D] split along H
    transpose           [b, H, s, D]
    attention           [b, H, s, D] where q, k and v are split alike
    view                [b, s, H·D]  which the next product sums over: each rank a part of the sum

What is not in this table gathers its operands first. That is always right, so that a rule says how to do without.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, TypeAlias

import sympy
import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr

aten = torch.ops.aten

Runs: TypeAlias = tuple[tuple[int, int], ...]
"""Half-open runs of indices along an axis, in the order in which a rank holds them."""


@dataclass(frozen=True)
class Split:
    """A tensor split along an axis (counted from 0): the runs of each rank."""

    axis: int
    runs: tuple[Runs, ...]

    def count(self, rank: int) -> int:
        """Indices that a rank has."""
        return sum(end - start for start, end in self.runs[rank])

    @property
    def contiguous(self) -> bool:
        """Whether the ranks' parts, joined in order, are the tensor."""
        flat = [run for runs in self.runs for run in runs]
        return all(a[1] == b[0] for a, b in pairwise(flat))


Splits: TypeAlias = dict[fx.Node, Split]
Rule: TypeAlias = Callable[[Program, fx.Node, Splits], Split | None]


def sizes(node: fx.Node) -> list[Any]:
    """A tensor's sizes: integers, or expressions."""
    return [dim_expr(size) for size in node.meta["val"].shape]


def tensors(node: fx.Node) -> list[fx.Node]:
    """Arguments that are tensors."""
    return [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]


# ---------------------------------------------------------------- rules


def pointwise(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """Operands that are split are split alike, counted from the last axis; others are cut to fit."""
    rank = node.meta["val"].dim()
    found: set[Split] = set()
    for source in tensors(node):
        if source in splits:
            split = splits[source]
            found.add(Split(split.axis + rank - source.meta["val"].dim(), split.runs))
    return found.pop() if len(found) == 1 else None


def view(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """An axis that is split is parted, or joined with those behind it, between runs only."""
    source = tensors(node)[0]
    return viewed(splits[source], sizes(source), sizes(node))


def viewed(split: Split, before: Sequence[Any], after: Sequence[Any]) -> Split | None:
    """What a split becomes when sizes `before` are read as sizes `after`."""
    for ins, outs in _groups(before, after):
        if split.axis not in ins:
            continue
        head = next((a for a in ins if before[a] != 1), ins[0])
        target = next((a for a in outs if after[a] != 1), None)
        if head != split.axis or target is None:
            return None
        inner = _static([before[a] for a in ins if a > split.axis])
        outer = _static([after[a] for a in outs if a > target])
        if inner is None or outer is None:
            return None
        flat = [tuple((s * inner, e * inner) for s, e in runs) for runs in split.runs]
        if any(edge % outer for runs in flat for run in runs for edge in run):
            return None
        return Split(target, tuple(tuple((s // outer, e // outer) for s, e in runs) for runs in flat))
    return None


def _static(found: list[Any]) -> int | None:
    product = 1
    for size in found:
        if not isinstance(size, int):
            return None
        product *= size
    return product


def _groups(before: Sequence[Any], after: Sequence[Any]) -> list[tuple[list[int], list[int]]]:
    """Runs of axes before and after whose sizes have one product."""
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(before) or j < len(after):
        ins, outs = [*range(i, min(i + 1, len(before)))], [*range(j, min(j + 1, len(after)))]
        left, right = (_product(before, ins), _product(after, outs))
        while left != right:
            more = j + len(outs) < len(after) and (_divides(right, left) or i + len(ins) >= len(before))
            if more:
                outs.append(j + len(outs))
            elif i + len(ins) < len(before):
                ins.append(i + len(ins))
            else:
                break  # sizes that cannot be told apart: one group of all that is left
            left, right = (_product(before, ins), _product(after, outs))
        i, j = i + len(ins), j + len(outs)
        while i < len(before) and before[i] == 1:
            ins, i = [*ins, i], i + 1
        while j < len(after) and after[j] == 1:
            outs, j = [*outs, j], j + 1
        groups.append((ins, outs))
    return groups


def _product(sizes: Sequence[Any], axes: list[int]) -> Any:
    found = sympy.Integer(1)
    for axis in axes:
        found = found * sizes[axis]
    return sympy.expand(found)


def _divides(small: Any, large: Any) -> bool:
    """Whether one product of sizes is a factor of another."""
    quotient = sympy.cancel(large / small)
    return bool(sympy.denom(quotient) == 1)


def transposed(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    source = tensors(node)[0]
    rank, split = source.meta["val"].dim(), splits[source]
    order = list(range(rank))
    if node.target is aten.permute.default:
        order = [int(a) % rank for a in program.arg(node, "dims")]
    else:
        a, b = (int(program.arg(node, name)) % rank for name in ("dim0", "dim1"))
        order[a], order[b] = order[b], order[a]
    return Split(order.index(split.axis), split.runs)


def unsqueezed(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    source = tensors(node)[0]
    split, at = splits[source], int(program.arg(node, "dim")) % node.meta["val"].dim()
    return Split(split.axis + (at <= split.axis), split.runs)


def squeezed(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    source = tensors(node)[0]
    split, at = splits[source], int(program.arg(node, "dim")) % source.meta["val"].dim()
    if node.meta["val"].dim() == source.meta["val"].dim():
        return split
    return Split(split.axis - (at < split.axis), split.runs)


def sliced(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """A slice along another axis, or a part of the split one."""
    source = tensors(node)[0]
    split, at = splits[source], int(program.arg(node, "dim")) % source.meta["val"].dim()
    if at != split.axis:
        return split
    bounds = slice_bounds(program, node)
    if bounds is None:
        return None
    return cut(split, *bounds)


def slice_bounds(program: Program, node: fx.Node) -> tuple[int, int] | None:
    """Where a slice along an axis of known size starts and ends; None where that is not known, or it has a stride."""
    source = tensors(node)[0]
    size = sizes(source)[int(program.arg(node, "dim")) % source.meta["val"].dim()]
    start, end, step = (program.arg(node, name) for name in ("start", "end", "step"))
    known = all(isinstance(v, int | None) for v in (start, end)) and isinstance(size, int)
    if not known or step != 1:
        return None
    begin, finish, _ = slice(start, end).indices(size)
    return begin, finish


def cut(split: Split, start: int, end: int) -> Split | None:
    """The part from `start` to `end` of the split axis; None where a rank's part of it is in pieces or nothing."""
    found = []
    for runs in split.runs:
        inside = tuple((max(a, start) - start, min(b, end) - start) for a, b in runs if a < end and b > start)
        if len(inside) != 1:
            return None
        found.append(inside)
    return Split(split.axis, tuple(found))


def joined(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """A cat along another axis."""
    found = {splits[source] for source in tensors(node) if source in splits}
    axis = int(program.arg(node, "dim")) % node.meta["val"].dim()
    split = found.pop() if len(found) == 1 else None
    return None if split is None or split.axis == axis else split


def expanded(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    source = tensors(node)[0]
    split = splits[source]
    return Split(split.axis + node.meta["val"].dim() - source.meta["val"].dim(), split.runs)


def attention(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """Heads: q, k and v alike, or each rank's queries those of its keys."""
    q, k, v = (program.arg(node, name) for name in ("query", "key", "value"))
    if any(operand not in splits for operand in (q, k, v)) or splits[k] != splits[v]:
        return None
    rank = q.meta["val"].dim()
    if splits[q].axis != rank - 3 or splits[k].axis != rank - 3:
        return None
    share, rest = divmod(sizes(q)[rank - 3], sizes(k)[rank - 3])
    same = tuple(tuple((a * share, b * share) for a, b in runs) for runs in splits[k].runs)
    mask = program.arg(node, "attn_mask")
    whole = mask is None or (mask not in splits and (mask.meta["val"].dim() < 3 or sizes(mask)[-3] == 1))
    return splits[q] if not rest and same == splits[q].runs and whole else None


def batched(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """A product of stacks of matrices, the stack split."""
    operands = tensors(node)
    rank = node.meta["val"].dim()
    if any(o not in splits or o.meta["val"].dim() != rank for o in operands):
        return None
    found = {splits[o] for o in operands}
    split = found.pop() if len(found) == 1 else None
    return split if split is not None and split.axis < rank - 2 else None


def along_axis(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """Softmax along another axis."""
    source = tensors(node)[0]
    axis = int(program.arg(node, "dim")) % source.meta["val"].dim()
    return None if axis == splits[source].axis else splits[source]


def normalized(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """A norm over other axes, the last ones; it may be of each head."""
    source = program.arg(node, "input")
    axes = len(program.arg(node, "normalized_shape"))
    found = splits.get(source)
    return found if found is not None and found.axis < source.meta["val"].dim() - axes else None


def reduced(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """A reduction over other axes."""
    source = tensors(node)[0]
    rank, split = source.meta["val"].dim(), splits[source]
    axes = {int(a) % rank for a in program.arg(node, "dim") or range(rank)}
    if split.axis in axes:
        return None
    keep = bool(program.arg(node, "keepdim"))
    return split if keep else Split(split.axis - sum(a < split.axis for a in axes), split.runs)


RULES: dict[Any, Rule] = {
    **dict.fromkeys(
        (
            *(aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.neg.default, aten.abs.default),
            *(aten.silu.default, aten.gelu.default, aten.relu.default, aten.tanh.default, aten.sigmoid.default),
            *(aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.to.dtype, aten.contiguous.default, aten.clone.default),
            *(aten.round.default, aten.clamp.default, aten.dropout.default, aten.exp.default, aten.cos.default),
            *(aten.sin.default, aten.mul.Scalar, aten.add.Scalar, aten.sub.Scalar, aten.div.Scalar),
        ),
        pointwise,
    ),
    **dict.fromkeys(
        (
            *(aten.view.default, aten.reshape.default, aten._unsafe_view.default),
            *(aten.unflatten.int, aten.flatten.using_ints),
        ),
        view,
    ),
    aten.transpose.int: transposed,
    aten.permute.default: transposed,
    aten.unsqueeze.default: unsqueezed,
    aten.squeeze.dim: squeezed,
    aten.slice.Tensor: sliced,
    aten.cat.default: joined,
    aten.expand.default: expanded,
    aten.scaled_dot_product_attention.default: attention,
    aten.matmul.default: batched,
    aten.bmm.default: batched,
    aten.softmax.int: along_axis,
    aten._softmax.default: along_axis,
    aten.layer_norm.default: normalized,
    aten.rms_norm.default: normalized,
    **dict.fromkeys((aten.mean.dim, aten.sum.dim_IntList, aten.amax.default, aten.amin.default), reduced),
}
