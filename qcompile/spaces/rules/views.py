"""Operators that only move elements."""

from __future__ import annotations

import itertools
import operator
from typing import Any

import numpy as np
import torch
from torch import fx

from qcompile.spaces.layout import Layout, plain, product, same, viewed
from qcompile.spaces.registry import rule
from qcompile.spaces.walk import Walk, sizes
from qcompile.spaces.wires import MIXING, Level

aten = torch.ops.aten


@rule(
    aten.view.default,
    aten.reshape.default,
    aten._unsafe_view.default,
    aten.flatten.using_ints,
    aten.unflatten.int,
    aten.view_as.default,
    aten.reshape_as.default,
    says="splits and merges axes: (heads · features) ⟷ heads × features; wires go along",
)
def view(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = viewed(walk.of(node.args[0]), sizes(node), walk.spread(node))
    return walk.barrier(node, "cuts across channels and tokens") if layout is None else layout


@rule(
    aten.transpose.int,
    aten.t.default,
    aten.numpy_T.default,
    aten.mT.default,
    aten.permute.default,
    aten.movedim.int,
    says="axes in another order",
)
def transpose(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    return layout.permuted(_order(walk, node, layout.rank))


def _order(walk: Walk, node: fx.Node, rank: int) -> list[int]:
    order = list(range(rank))
    if node.target is aten.permute.default:
        return [int(d) % rank for d in walk.program.arg(node, "dims")]
    if node.target in (aten.t.default, aten.numpy_T.default):
        return order[::-1]
    if node.target is aten.movedim.int:
        source, target = (int(walk.program.arg(node, name)) % rank for name in ("source", "destination"))
        order.insert(target, order.pop(source))
        return order
    dims = (-2, -1) if node.target is aten.mT.default else [walk.program.arg(node, name) for name in ("dim0", "dim1")]
    first, second = (int(d) % rank for d in dims)
    order[first], order[second] = second, first
    return order


@rule(aten.unsqueeze.default, says="a new axis of size 1")
def unsqueeze(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    return layout.inserted(int(walk.program.arg(node, "dim")) % (layout.rank + 1))


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default, says="axes of size 1 go")
def squeeze(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return view(walk, node)


@rule(aten.expand.default, aten.broadcast_to.default, aten.expand_as.default, says="copies along an axis")
def expand(walk: Walk, node: fx.Node) -> Layout:
    return walk.of(node.args[0]).expanded(sizes(node))


@rule(aten.repeat.default, aten.tile.default, says="copies along axes")
def repeat(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    repeats = list(node.args[1])  # type: ignore[arg-type]
    while layout.rank < len(repeats):
        layout = layout.inserted(0)
    shape = sizes(node)
    for axis, times in enumerate([1] * (layout.rank - len(repeats)) + repeats):
        if times == 1:
            continue
        if not layout.has_wires_along(axis):
            layout = layout.sized(axis, shape[axis])
            continue
        taken = _copies(layout, axis, lambda n, t=times: np.tile(np.arange(n), t)) if isinstance(times, int) else None
        if taken is None:
            return walk.barrier(node, "repeats channels a varying number of times")
        layout = taken
    return layout


@rule(aten.repeat_interleave.self_int, says="copies of each entry of an axis")
def repeat_interleave(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout, times, dim = walk.of(node.args[0]), walk.program.arg(node, "repeats"), walk.program.arg(node, "dim")
    if dim is None or not isinstance(times, int):
        return walk.barrier(node, "repeats a flattened or varying number of entries")
    axis = int(dim) % layout.rank
    if not layout.has_wires_along(axis):
        return layout.sized(axis, sizes(node)[axis])
    taken = _copies(layout, axis, lambda n: np.repeat(np.arange(n), times))
    return taken or walk.barrier(node, "repeats channels and tokens at once")


def repeated(layout: Layout, axis: int, times: int) -> Layout:
    """Each entry of an axis of fixed size so many times in a row."""
    size = int(product(layout.axes[axis]))
    if not layout.has_wires_along(axis):
        return layout.sized(axis, size * times)
    taken = _copies(layout, axis, lambda n: np.repeat(np.arange(n), times))
    assert taken is not None  # a fixed size can always be laid out
    return taken


def _copies(layout: Layout, axis: int, index: Any) -> Layout | None:
    flat = layout.flat(axis)
    return None if flat is None else flat.taken(axis, index(int(product(flat.axes[axis]))))


@rule(
    aten.slice.Tensor, says="a part of an axis: of the channels, the wires that are left; of the tokens, whole vectors"
)
def slice_(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    axis = int(walk.program.arg(node, "dim")) % layout.rank
    shape = sizes(node)
    if same(product(layout.axes[axis]), shape[axis]) and walk.program.arg(node, "step") == 1:
        return layout
    if not layout.has_wires_along(axis):
        return part(walk, node, layout, axis, shape[axis])
    start, end, step = (walk.program.arg(node, name) for name in ("start", "end", "step"))
    if not all(isinstance(v, int) or v is None for v in (start, end, step)):
        return walk.barrier(node, "takes a varying part of the channels")
    count = product(layout.axes[axis])
    taken = layout.taken(axis, np.arange(count)[start:end:step], walk.spread(node)) if isinstance(count, int) else None
    return taken or walk.barrier(node, "takes channels and tokens apart at once")


def part(walk: Walk, node: fx.Node, layout: Layout, axis: int, size: Any) -> Layout:
    """Some entries of an axis along which no wires differ: whole vectors, from other positions."""
    moved = walk.follow(layout, node) if layout.varies_along(axis) else layout
    return moved.sized(axis, size)


@rule(aten.select.int, says="one entry of an axis")
def select(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    return _entry(walk, node, layout, int(walk.program.arg(node, "dim")) % layout.rank, walk.program.arg(node, "index"))


@rule(aten.unbind.int, says="every entry of an axis on its own")
def unbind(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    axis = int(walk.program.arg(node, "dim")) % layout.rank
    flat = layout.flat(axis, walk.spread(node)) or layout
    entries = [_entry(walk, node, flat, axis, i) for i in range(len(node.meta["val"]))]
    return [e for e in entries if isinstance(e, Layout)]


def _entry(walk: Walk, node: fx.Node, layout: Layout, axis: int, index: Any) -> Layout | list[Layout]:
    if not layout.has_wires_along(axis):
        moved = walk.follow(layout, node) if layout.varies_along(axis) else layout
        return moved.sized(axis, 1).without(axis)
    count = product(layout.axes[axis])
    if not isinstance(index, int) or not isinstance(count, int):
        return walk.barrier(node, "takes a varying channel")
    taken = layout.taken(axis, np.arange(count)[[index]], walk.spread(node))
    return taken.without_single(axis) if taken is not None else walk.barrier(node, "takes channels and tokens apart")


@rule(
    aten.split.Tensor,
    aten.split.sizes,
    aten.split_with_sizes.default,
    aten.chunk.default,
    aten.tensor_split.sections,
    says="parts of an axis: fused q, k, v and gate, up fall apart",
)
def split(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    axis = int(walk.program.arg(node, "dim")) % layout.rank
    parts = [v.shape[axis] for v in node.meta["val"]]
    if not layout.has_wires_along(axis):
        return [part(walk, node, layout, axis, size) for size in parts]
    if not all(isinstance(size, int) for size in parts):
        return walk.barrier(node, "splits the channels at varying places")
    flat = layout.flat(axis, walk.spread(node))
    if flat is None:
        return walk.barrier(node, "takes channels and tokens apart at once")
    ends = np.cumsum([0, *parts])
    taken = [flat.taken(axis, np.arange(a, b)) for a, b in itertools.pairwise(ends)]
    return [t for t in taken if t is not None]


@rule(operator.getitem, says="one of several results")
def getitem(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    source, index = node.args
    assert isinstance(source, fx.Node)
    assert isinstance(index, int)
    found = walk.layouts[source]
    return found[index] if isinstance(found, list) else found


@rule(aten.flip.default, aten.roll.default, says="entries of axes in another order")
def reorder(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout: Layout | None = walk.of(node.args[0])
    assert layout is not None
    dims = [int(d) % layout.rank for d in walk.program.arg(node, "dims")]
    if not dims:
        return walk.barrier(node, "rolls through all axes")
    shifts = list(node.args[1]) if node.target is aten.roll.default else [None] * len(dims)  # type: ignore[arg-type]
    for axis, shift in zip(dims, shifts, strict=True):
        if layout is None:
            break
        if not layout.has_wires_along(axis):
            layout = walk.follow(layout, node)
            continue
        count = product(layout.axes[axis])
        if not isinstance(count, int) or not isinstance(shift, int | None):
            layout = None
        else:
            places = np.arange(count)
            layout = layout.taken(axis, places[::-1] if shift is None else np.roll(places, shift), walk.spread(node))
    return layout or walk.barrier(node, "reorders channels by a varying number")


@rule(
    aten.view_as_complex.default,
    says="pairs of channels as complex numbers: one positive factor a pair",
)
def view_as_complex(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0]).flat(walk.of(node.args[0]).rank - 1)
    if layout is None:
        return walk.barrier(node, "takes pairs of channels and tokens")
    if not layout.has_wires:
        return plain(sizes(node))
    walk.stop(layout, node, "turns pairs of channels", MIXING)
    first = layout.ids[..., :1]
    walk.wires.join(first, layout.ids, (Level.DIAGONAL,))
    return Layout(layout.axes[:-1], first[..., 0], layout.varies[:-1])


@rule(aten.view_as_real.default, says="complex numbers as pairs of channels")
def view_as_real(walk: Walk, node: fx.Node) -> Layout:
    layout = walk.of(node.args[0])
    return layout.inserted(layout.rank, 2)
