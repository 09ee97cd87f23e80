"""Operators that sum, or choose, along axes."""

from __future__ import annotations

import numpy as np
import torch
from torch import fx

from qcompile.spaces.layout import Layout, product
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.broadcast import row_numbers
from qcompile.spaces.walk import Walk, no_wires, sizes
from qcompile.spaces.wires import VECTOR, Level

aten = torch.ops.aten


@rule(
    aten.sum.dim_IntList,
    aten.mean.dim,
    aten.cumsum.default,
    aten.adaptive_avg_pool2d.default,
    aten.avg_pool2d.default,
    says="over tokens: a linear map of whole vectors; over channels: permutations only",
)
def total(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    axes = _axes(walk, node, layout.rank)
    if not layout.has_wires:
        return no_wires(node)
    if any(layout.has_wires_along(axis) for axis in axes):
        return _over_channels(walk, node, layout, axes)
    result = walk.follow(layout, node)
    shape = sizes(node)
    if len(shape) == layout.rank:
        for axis in axes:
            result = result.sized(axis, shape[axis])
        return result
    for axis in reversed(axes):
        result = result.sized(axis, 1).without(axis)
    return result


def _axes(walk: Walk, node: fx.Node, rank: int) -> list[int]:
    if "pool2d" in str(node.target):
        return [rank - 2, rank - 1]
    dims = walk.program.arg(node, "dim")
    if dims is None or dims == []:
        return list(range(rank))
    return sorted(int(d) % rank for d in (dims if isinstance(dims, (list, tuple)) else [dims]))


def _over_channels(walk: Walk, node: fx.Node, layout: Layout, axes: list[int]) -> Layout | list[Layout]:
    """A sum over channels keeps where a permutation stays inside what is summed."""
    if node.target is aten.cumsum.default or "pool" in str(node.target):
        return walk.barrier(node, "runs along the channels")
    summed = {place for axis in axes for place in layout.atoms(axis)}
    kept = tuple(place not in summed for place in range(layout.ids.ndim))
    walk.rows(layout, node, "sums over channels", row_numbers(layout.ids, kept), (Level.PERMUTATION,))
    walk.stop(layout, node, "sums over channels", (Level.DIAGONAL, *VECTOR))
    return no_wires(node)


@rule(
    aten.max_pool2d.default,
    aten.amax.default,
    aten.amin.default,
    says="the largest over tokens: permutations pass",
)
def largest(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    shape = sizes(node)
    axes = _axes(walk, node, layout.rank)
    if len(shape) != layout.rank or any(layout.has_wires_along(axis) for axis in axes):
        return walk.barrier(node, "takes the largest of several channels")
    walk.stop(layout, node, "takes the largest over tokens", (Level.DIAGONAL, *VECTOR))
    for axis in axes:
        layout = layout.sized(axis, shape[axis])
    return layout


@rule(
    aten.softmax.int,
    aten._softmax.default,
    aten.log_softmax.int,
    says="over tokens: nothing but permutations of channels; over channels: permutations within them",
)
def softmax(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    axis = int(walk.program.arg(node, "dim")) % layout.rank
    if layout.has_wires:
        kept = tuple(place not in layout.atoms(axis) for place in range(layout.ids.ndim))
        rows = row_numbers(layout.ids, kept)
        if layout.has_wires_along(axis):
            walk.rows(layout, node, "softmax over channels", rows, (Level.PERMUTATION,))
        walk.stop(layout, node, "softmax", (Level.DIAGONAL, *VECTOR))
    varies = tuple(
        v or (i in layout.atoms(axis) and product(layout.axes[axis]) != 1) for i, v in enumerate(layout.varies)
    )
    return Layout(layout.axes, np.asarray(layout.ids), varies)
