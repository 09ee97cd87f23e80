"""Operators that put tensors side by side."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.spaces.layout import Layout, plain, product
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.broadcast import paired
from qcompile.spaces.walk import Walk, sizes
from qcompile.spaces.wires import EVERY, MIXING

aten = torch.ops.aten


@rule(
    aten.cat.default,
    aten.concat.default,
    aten.concatenate.default,
    says="along the channels: one vector after the other, each with its own T; along tokens: all move by the same T",
)
def cat(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    tensors = [n for n in walk.program.arg(node, "tensors") if not _empty(n)]
    axis = int(walk.program.arg(node, "dim")) % len(sizes(node))
    return _joined(walk, node, [walk.of(n) for n in tensors], axis)


@rule(aten.stack.default, says="as cat, along a new axis")
def stack(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    axis = int(walk.program.arg(node, "dim")) % len(sizes(node))
    return _joined(walk, node, [walk.of(n).inserted(axis) for n in walk.program.arg(node, "tensors")], axis)


def _empty(node: fx.Node) -> bool:
    value = node.meta["val"]
    return isinstance(value, Tensor) and any(isinstance(s, int) and s == 0 for s in value.shape)


def _joined(walk: Walk, node: fx.Node, layouts: list[Layout], axis: int) -> Layout | list[Layout]:
    if not any(layout.has_wires for layout in layouts):
        return plain(sizes(node), zero=bool(layouts) and all(layout.zero for layout in layouts))
    ones = all(product(layout.axes[axis]) == 1 for layout in layouts)
    if ones or any(layout.has_wires_along(axis) for layout in layouts):
        return _side_by_side(walk, node, layouts, axis)
    return _tokens(walk, node, layouts, axis)


def _side_by_side(walk: Walk, node: fx.Node, layouts: list[Layout], axis: int) -> Layout | list[Layout]:
    """Along an axis of channels: every tensor keeps its wires."""
    flat = [layout.all_flat(walk.spread(node)) for layout in layouts]
    if not all(isinstance(product(layout.axes[axis]), int) for layout in layouts) or None in flat:
        return walk.barrier(node, "puts channels beside a varying number of tokens")
    kept = [layout for layout in flat if layout is not None]
    other = [max(layout.ids.shape[i] for layout in kept) for i in range(kept[0].rank)]
    parts = []
    for layout in kept:
        shape = list(other)
        shape[axis] = int(product(layout.axes[axis]))
        parts.append(np.broadcast_to(layout.ids, shape))
    varies = tuple(any(flags) for flags in zip(*(layout.varies for layout in kept), strict=True))
    varies = (*varies[:axis], True, *varies[axis + 1 :])
    return Layout(tuple((s,) for s in sizes(node)), np.concatenate(parts, axis), varies)


def _tokens(walk: Walk, node: fx.Node, layouts: list[Layout], axis: int) -> Layout | list[Layout]:
    """Along tokens, the batch, the cache: the same vectors, more of them."""
    size = sizes(node)[axis]
    nodes = node.args[0] if isinstance(node.args[0], (list, tuple)) else ()
    fixed = [n in walk.constants for n in nodes if not _empty(n)] if len(nodes) else []  # type: ignore[arg-type]
    wired = [i for i, layout in enumerate(layouts) if layout.has_wires]
    others = [layout for layout in layouts if not layout.has_wires and not layout.zero]
    if others and fixed and all(fixed[i] for i in wired):
        for i in wired:
            walk.stop(layouts[i], node, "goes into values that no weight makes")
        return plain(sizes(node))
    first = layouts[wired[0]].sized(axis, size)
    result = walk.follow(first, node)
    for layout in layouts:
        other = layout.sized(axis, size)
        pair = paired(result, other)
        if pair is None:
            return walk.barrier(node, "joins tensors whose merged axes do not line up")
        if other.has_wires:
            wide, theirs = np.broadcast_arrays(pair.a, pair.b)
            walk.wires.join(wide, theirs)
            walk.wires.same_copy(wide, theirs)
            event = walk.wires.event(node, "joins channels with values that no weight makes")
            walk.wires.limit(EVERY, np.where(theirs < 0, wide, -1), event)
            walk.wires.limit(EVERY, np.where(wide < 0, theirs, -1), event)
            walk.wires.together(MIXING, pair.b, walk.wires.event(node, "joined along tokens"))
        elif not other.zero:
            walk.stop(result, node, "joins channels with values that no weight makes")
    return result.sized(axis, size)


@rule(
    aten.constant_pad_nd.default, aten.pad.default, says="zeros beside tokens: whole vectors; beside channels: no wires"
)
def pad(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout, amounts = walk.of(node.args[0]), list(node.args[1])  # type: ignore[arg-type]
    if node.target is aten.pad.default and walk.program.arg(node, "mode") != "constant":
        return walk.barrier(node, "repeats or reflects tokens")
    shape, value = sizes(node), walk.program.arg(node, "value")
    for pair, (before, after) in enumerate(zip(amounts[::2], amounts[1::2], strict=True)):
        axis = layout.rank - 1 - pair
        if before == 0 and after == 0:
            continue
        if not layout.has_wires_along(axis):
            if value not in (0, None):
                walk.stop(layout, node, "puts a number beside tokens")
            layout = walk.follow(layout, node).sized(axis, shape[axis])
            continue
        flat = layout.flat(axis, walk.spread(node))
        if flat is None or not isinstance(before, int) or not isinstance(after, int):
            return walk.barrier(node, "pads the channels by a varying number")
        (place,) = flat.atoms(axis)
        widths = [(max(before, 0), max(after, 0)) if i == place else (0, 0) for i in range(flat.ids.ndim)]
        cut = slice(max(-before, 0), flat.ids.shape[place] - max(-after, 0))
        ids = flat.ids[tuple(cut if i == place else slice(None) for i in range(flat.ids.ndim))]
        ids = np.pad(ids, widths, constant_values=-1)
        axes = (*flat.axes[:axis], (ids.shape[place],), *flat.axes[axis + 1 :])
        layout = Layout(axes, ids, flat.varies)
    return layout


@rule(
    aten.zeros.default,
    aten.zeros_like.default,
    aten.new_zeros.default,
    aten.new_empty.default,
    aten.empty.memory_format,
    aten.empty_like.default,
    aten.full.default,
    aten.full_like.default,
    aten.new_full.default,
    aten.scalar_tensor.default,
    says="a constant; zero, and what is written over, fits every space",
)
def constant(walk: Walk, node: fx.Node) -> Layout:
    named = {aten.full.default, aten.full_like.default, aten.new_full.default}
    zero = (
        walk.program.arg(node, "fill_value") == 0
        if node.target in named
        else any(word in str(node.target) for word in ("zeros", "empty"))
    )
    return plain(sizes(node), varies=False, zero=zero)


@rule(aten.copy.default, says="what is written over a tensor")
def copy(walk: Walk, node: fx.Node) -> Layout:
    return walk.of(node.args[1]).expanded(sizes(node))


@rule(
    aten.slice_scatter.default,
    aten.select_scatter.default,
    says="a part of a tensor, written over: of the channels, other wires; of the tokens, all move by the same T",
)
def scatter_part(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    base, part = walk.of(node.args[0]), walk.of(node.args[1])
    axis = int(walk.program.arg(node, "dim")) % base.rank
    chosen = node.target is aten.select_scatter.default
    if chosen:
        part = part.inserted(axis)
    count = product(base.axes[axis])
    if not (base.has_wires_along(axis) or part.has_wires_along(axis) or (base.zero and part.has_wires)):
        return _tokens(walk, node, [base, part], axis) if base.has_wires or part.has_wires else plain(sizes(node))
    bounds = (
        [walk.program.arg(node, "index")] if chosen else [walk.program.arg(node, n) for n in ("start", "end", "step")]
    )
    flat, over = (x.all_flat(walk.spread(node)) for x in (base, part))
    if flat is None or over is None or not isinstance(count, int) or not all(isinstance(b, int | None) for b in bounds):
        return walk.barrier(node, "writes over a varying part of the channels")
    places = np.arange(count)[[bounds[0]]] if chosen else np.arange(count)[slice(*bounds)]
    shape = [max(a, b) for a, b in zip(flat.ids.shape, over.ids.shape, strict=True)]
    shape[axis] = count
    ids = np.array(np.broadcast_to(flat.ids, shape))
    shape[axis] = len(places)
    ids[tuple(places if i == axis else slice(None) for i in range(ids.ndim))] = np.broadcast_to(over.ids, shape)
    varies = tuple(a or b or i == axis for i, (a, b) in enumerate(zip(flat.varies, over.varies, strict=True)))
    return Layout(flat.axes, ids, varies)
