"""Operators that pick or place tokens by an index."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.pointwise import summed
from qcompile.spaces.walk import Walk, sizes

aten = torch.ops.aten


@rule(aten.embedding.default, says="starts a space; the table is its source: any T")
def embedding(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    from qcompile.spaces.rules.products import source

    found = walk.embeddings.get(node)
    if found is None:
        return walk.barrier(node, walk.obstacles.get(node, "looks rows up in a computed table"))
    return source(walk, node, found.weight, found.axis_features, len(sizes(node)) - 1)


@rule(
    aten.index.Tensor,
    aten.index_select.default,
    says="tokens chosen by an index: whole vectors; channels chosen by an index: nothing passes",
)
def index(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout, indices = walk.of(node.args[0]), _indices(walk, node)
    given = [axis for axis, index in enumerate(indices) if index is not None]
    if node.args[0] in walk.constants:
        layout = _table(walk, node, layout, given)
    if any(layout.has_wires_along(axis) for axis in given):
        return walk.barrier(node, "picks channels by an index")
    if any(walk.of(i).has_wires for i in indices if i is not None):
        return walk.barrier(node, "is an index made of channels")
    result = walk.follow(layout, node)
    shape, rank = sizes(node), layout.rank
    adjacent = given == list(range(given[0], given[-1] + 1))
    for axis in reversed(given):
        result = result.sized(axis, 1).without(axis)
    place = given[0] if adjacent else 0
    new = len(shape) - (rank - len(given))
    for k in range(new):
        result = result.inserted(place + k, shape[place + k])
    return _differing(result, range(place, place + new))


def _table(walk: Walk, node: fx.Node, layout: Layout, axes: list[int]) -> Layout:
    """A weight whose rows are picked: all rows move alike. The last axis has the channels."""
    ids, places = layout.ids, {p for axis in axes if axis != layout.rank - 1 for p in layout.atoms(axis)}
    for place in places:
        if ids.shape[place] > 1:
            ids = walk.collapsed(ids, place, node)
    return Layout(layout.axes, ids, layout.varies)


def _indices(walk: Walk, node: fx.Node) -> list[Any]:
    if node.target is aten.index.Tensor:
        return list(node.args[1])  # type: ignore[arg-type]
    axis = int(walk.program.arg(node, "dim")) % walk.of(node.args[0]).rank
    return [None] * axis + [walk.program.arg(node, "index")]


def _differing(layout: Layout, axes: range) -> Layout:
    places = {i for axis in axes for i in layout.atoms(axis)}
    return Layout(layout.axes, layout.ids, tuple(v or i in places for i, v in enumerate(layout.varies)))


@rule(
    aten.gather.default,
    says="tokens chosen by an index that is the same for all channels: whole vectors",
)
def gather(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout, by = walk.of(node.args[0]), walk.of(node.args[2])
    axis = int(walk.program.arg(node, "dim")) % layout.rank
    if not layout.has_wires and not by.has_wires:
        return walk.barrier(node, "")
    if by.has_wires or _apart(layout, by, axis):
        return walk.barrier(node, "picks another token for each channel")
    return walk.follow(layout, node).sized(axis, sizes(node)[axis])


def _apart(layout: Layout, by: Layout, axis: int) -> bool:
    """Whether an index treats the channels of one vector differently."""
    if layout.has_wires_along(axis):
        return True
    return any(layout.has_wires_along(i) and by.varies_along(i) for i in range(layout.rank))


@rule(
    aten.scatter_add.default,
    aten.scatter.src,
    aten.index_add.default,
    aten.index_put.default,
    aten.index_copy.default,
    says="vectors placed at, or added to, tokens by an index: both move by the same T",
)
def place(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    base = walk.of(node.args[0])
    values, by, axes = _placed(walk, node, base.rank)
    if values is None or any(base.has_wires_along(a) or values.has_wires_along(a - base.rank) for a in axes):
        return walk.barrier(node, "places channels by an index")
    if any(i.has_wires for i in by):
        return walk.barrier(node, "is an index made of channels")
    if node.target in (aten.scatter_add.default, aten.scatter.src) and _apart(values, by[0], axes[0]):
        return walk.barrier(node, "places another token for each channel")
    for axis in axes:
        values = values.sized(axis, sizes(node)[axis])
    moved = walk.follow(values, node)
    result = summed(walk, node, base, moved)
    return result if base.has_wires or not isinstance(result, Layout) else Layout(base.axes, result.ids, result.varies)


def _placed(walk: Walk, node: fx.Node, rank: int) -> tuple[Layout | None, list[Layout], list[int]]:
    """What is placed, the indices, and the axes they run along; None where the values' axes are not the base's."""
    if node.target is aten.index_put.default:
        indices = list(walk.program.arg(node, "indices"))
        values = walk.of(walk.program.arg(node, "values"))
        given = [i for i in indices if i is not None]
        axes = [axis for axis, i in enumerate(indices) if i is not None]
        fits = len(given) == 1 and len(given[0].meta["val"].shape) == 1 and values.rank == rank
        return (values if fits else None), [walk.of(i) for i in given], axes
    axis = int(walk.program.arg(node, "dim")) % rank
    source = "src" if "scatter" in str(node.target) else "source"
    return walk.of(walk.program.arg(node, source)), [walk.of(walk.program.arg(node, "index"))], [axis]


def wires_along(walk: Walk, node: fx.Node, layout: Layout, axis: int) -> Ids | None:
    """Wires of an axis as rows ``[others, axis]``; None where they cannot be laid out."""
    flat = layout.flat(axis, walk.spread(node))
    if flat is None:
        return None
    (at,) = flat.atoms(axis)
    return _rows(flat.ids, at)


def _rows(ids: Ids, axis: int) -> Ids:
    import numpy as np

    moved = np.moveaxis(ids, axis, -1)
    return moved.reshape(-1, moved.shape[-1])
