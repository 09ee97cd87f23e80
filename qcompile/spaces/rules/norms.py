"""Normalisations: what they keep is the length of a vector."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import fx

from qcompile.spaces.layout import Layout, along, plain, product
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.broadcast import paired, row_numbers
from qcompile.spaces.rules.pointwise import scaled, summed
from qcompile.spaces.walk import Use, Walk
from qcompile.spaces.wires import MIXING, VECTOR, Level

aten = torch.ops.aten


@rule(
    aten.rms_norm.default,
    says="without a gain: orthogonal T pass (the length is kept, eps is untouched); with one: permutations on its"
    " input, and diagonals start at the gain",
)
def rms_norm(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return _normalised(walk, node, centred=False)


@rule(aten.layer_norm.default, says="as rms_norm once the mean is folded into the sources; permutations before")
def layer_norm(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    return _normalised(walk, node, centred=True)


def _normalised(walk: Walk, node: fx.Node, centred: bool) -> Layout | list[Layout]:
    layout = walk.of(walk.program.arg(node, "input"))
    if len(walk.program.arg(node, "normalized_shape")) != 1:
        return walk.barrier(node, "normalises over several axes")
    flat = layout.flat(layout.rank - 1)
    if flat is None:
        return walk.barrier(node, "normalises over channels and tokens at once")
    result: Layout | list[Layout] = _unit(walk, node, flat, centred) if flat.has_wires else flat
    gain = walk.program.arg(node, "weight")
    if isinstance(gain, fx.Node) and isinstance(result, Layout) and not result.has_wires:
        result = _from_gain(walk, node, result, walk.of(gain))
    elif isinstance(gain, fx.Node) and isinstance(result, Layout):
        result = scaled(walk, node, result, walk.of(gain), (False, gain in walk.constants))
    bias = walk.program.arg(node, "bias") if centred else None
    if isinstance(bias, fx.Node) and isinstance(result, Layout):
        result = summed(walk, node, result, walk.of(bias))
    return result


def _from_gain(walk: Walk, node: fx.Node, layout: Layout, gain: Layout) -> Layout:
    """What no weight makes, times a gain: a diagonal may start there."""
    pair = paired(layout, gain)
    assert pair is not None  # a gain has one axis
    walk.stop(gain, node, "its gain scales each channel", MIXING)
    return pair.layout(pair.b)


def _unit(walk: Walk, node: fx.Node, layout: Layout, centred: bool) -> Layout:
    """The vector divided by its length: new wires, for its scale is another."""
    last = layout.ids.ndim - 1
    old = layout.ids
    rows = row_numbers(old, tuple(i != last for i in range(old.ndim)))
    new = walk.wires.beside(old)
    walk.wires.join(old, new, (Level.PERMUTATION, Level.ORTHOGONAL))
    walk.wires.same_copy(old, new)
    event = walk.wires.event(node, "divides each vector by its length")
    walk.wires.limit((Level.DIAGONAL,), old, event)
    walk.wires.limit((Level.DIAGONAL, Level.LINEAR), new, event)
    walk.wires.together((Level.PERMUTATION, *VECTOR), old, event, rows)
    if centred:
        mean = walk.wires.event(node, "subtracts the mean over channels (center-norm makes it an RMS norm)")
        walk.wires.limit((Level.ORTHOGONAL,), old, mean)
    for row in old.reshape(-1, old.shape[-1]):
        walk.uses.append(Use("norm", node, row))
    return layout.with_ids(new)


@rule(aten.group_norm.default, says="per group of channels: permutations within the group; diagonals start at the gain")
def group_norm(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    groups, count = walk.program.arg(node, "num_groups"), product(layout.axes[1])
    if not isinstance(count, int) or len(layout.atoms(1)) != 1:
        return walk.barrier(node, "normalises channels and tokens at once")
    rows = (np.arange(count) // (count // groups)).reshape([count if i == 1 else 1 for i in range(layout.ids.ndim)])
    return _per_channel(walk, node, layout, rows)


@rule(
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
    says="a gain and a bias per channel: permutations pass; diagonals start at the gain",
)
def batch_norm(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    layout = walk.of(node.args[0])
    if node.target is aten.batch_norm.default:
        if walk.program.arg(node, "training"):
            return walk.barrier(node, "normalises over the batch")
        return _per_channel(walk, node, layout, None)
    result = _per_channel(walk, node, layout, None)
    return [result, plain([]), plain([])] if isinstance(result, Layout) else [*result[:1], plain([]), plain([])]


def _per_channel(walk: Walk, node: fx.Node, layout: Layout, rows: Any) -> Layout | list[Layout]:
    """Channels on axis 1: each is scaled and shifted by numbers of its own."""
    if not layout.has_wires:
        return walk.barrier(node, "normalises what no weight makes")
    if not layout.has_wires_along(1):
        return walk.barrier(node, "takes tokens for channels")
    walk.stop(layout, node, "normalises each channel on its own", (Level.DIAGONAL, *VECTOR))
    if rows is not None:
        walk.rows(layout, node, "normalises by groups", rows, (Level.PERMUTATION,))
    result: Layout | list[Layout] = layout
    for name in ("running_mean", "running_var", "weight", "bias"):
        vector = _argument(walk, node, name)
        if not isinstance(vector, fx.Node) or not isinstance(result, Layout):
            continue
        wide = _on_channels(walk.of(vector), result)
        combine = scaled if name == "weight" else summed
        if name.startswith("running"):
            walk.wires.join(result.ids, wide.ids, (Level.PERMUTATION,))
            walk.stop(wide, node, "is a statistic of a channel", (Level.DIAGONAL, *VECTOR))
        else:
            result = combine(walk, node, result, wide)
    return result


def _argument(walk: Walk, node: fx.Node, name: str) -> Any:
    return walk.program.arg(node, name) if any(a.name == name for a in node.target._schema.arguments) else None  # type: ignore[union-attr]


def _on_channels(vector: Layout, like: Layout) -> Layout:
    shape = [1] * like.rank
    shape[1] = int(product(vector.axes[0]))
    return along(shape, 1, vector.ids) if vector.has_wires else vector
