"""Bring two layouts into one shape, as an operator on elements does."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Axis, Layout


@dataclass(frozen=True, eq=False)
class Pair:
    """Two layouts over the same atoms; either may have length 1 along an atom where the other has more."""

    axes: tuple[Axis, ...]
    a: Ids
    b: Ids
    a_varies: tuple[bool, ...]
    b_varies: tuple[bool, ...]

    def layout(self, ids: Ids) -> Layout:
        """A result in this shape."""
        varies = tuple(x or y for x, y in zip(self.a_varies, self.b_varies, strict=True))
        return Layout(self.axes, ids, varies)


def paired(a: Layout, b: Layout) -> Pair | None:
    """Both in the shape they broadcast to; None where their merged axes cannot be laid side by side."""
    rank = max(a.rank, b.rank)
    a, b = _padded(a, rank), _padded(b, rank)
    for axis in range(rank):
        aligned = _aligned(a, b, axis)
        if aligned is None:
            return None
        a, b = aligned
    axes = tuple(y if is_one(x) else x for x, y in zip(a.axes, b.axes, strict=True))
    return Pair(axes, a.ids, b.ids, a.varies, b.varies)


def _padded(layout: Layout, rank: int) -> Layout:
    while layout.rank < rank:
        layout = layout.inserted(0)
    return layout


def _aligned(a: Layout, b: Layout, axis: int) -> tuple[Layout, Layout] | None:
    """The same atoms for one axis of both; as many of other sizes are others."""
    mine, other = a.axes[axis], b.axes[axis]
    if mine == other:
        return a, b
    if is_one(mine) or (not a.has_wires_along(axis) and not is_one(other)):
        return _as_atoms(a, axis, other), b
    if is_one(other) or not b.has_wires_along(axis):
        return a, _as_atoms(b, axis, mine)
    flat_a, flat_b = a.flat(axis), b.flat(axis)
    return None if flat_a is None or flat_b is None else (flat_a, flat_b)


def _as_atoms(layout: Layout, axis: int, atoms: Axis) -> Layout:
    """An axis without wires, seen as the product of `atoms`; it is taken to differ along each if along any."""
    old = layout.atoms(axis)
    varies = layout.varies_along(axis)
    ids = layout.ids.reshape([*layout.ids.shape[: old.start], *[1] * len(atoms), *layout.ids.shape[old.stop :]])
    one = is_one(layout.axes[axis])
    axes = (*layout.axes[:axis], tuple(1 for _ in atoms) if one else atoms, *layout.axes[axis + 1 :])
    flags = (*layout.varies[: old.start], *(varies for _ in atoms), *layout.varies[old.stop :])
    return Layout(axes, ids, flags, layout.zero)


def is_one(axis: Axis) -> bool:
    return all(size == 1 for size in axis)


def row_numbers(ids: Ids, varies: tuple[bool, ...]) -> Ids:
    """For each place of `ids`, the number of the part in which a tensor that varies so does not vary."""
    shape = [size if flag else 1 for size, flag in zip(ids.shape, varies, strict=True)]
    return np.broadcast_to(np.arange(int(np.prod(shape))).reshape(shape), ids.shape)
