"""An axis that gets new entries behind some runs of its old ones."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from qcompile.spaces import ChannelSpaces, Level, Placement, Space
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout


@dataclass(frozen=True)
class Growth:
    """An axis of `size` on which `extra` new entries follow each run of `width` old ones, which start at `starts`."""

    size: int
    starts: tuple[int, ...]
    width: int
    extra: int

    @property
    def new_size(self) -> int:
        """The size of the axis with the new entries."""
        return self.size + self.extra * len(self.starts)

    def moved(self, place: int) -> int:
        """Where the old entry at `place`, or the boundary before it, is now."""
        return place + self.extra * sum(start + self.width <= place for start in self.starts)

    def apply(self, values: Tensor) -> Tensor:
        """Values ``[…, size]`` with zeros for the new entries: ``[…, new_size]``."""
        places = np.arange(self.size)
        ends = np.asarray(self.starts) + self.width
        behind = torch.from_numpy(places + self.extra * np.searchsorted(ends, places, "right")).to(values.device)
        grown = values.new_zeros([*values.shape[:-1], self.new_size])
        grown[..., behind] = values
        return grown


Grown = tuple[int, Growth]
"""The axis that grows, and how."""


def of_layout(spaces: ChannelSpaces, space: Space, layout: Layout, extra: int) -> Grown | str | None:
    """How a tensor grows with its space's channels; the reason why it cannot; None where it has none of them."""
    roots = np.where(layout.ids >= 0, spaces.wires.forest(Level.PERMUTATION).find(np.maximum(layout.ids, 0)), -1)
    inside = np.isin(roots, space.wires)
    if not inside.any():
        return None
    flat = layout.all_flat()
    if flat is None:
        return "has channels and tokens in one axis"
    roots = np.where(flat.ids >= 0, spaces.wires.forest(Level.PERMUTATION).find(np.maximum(flat.ids, 0)), -1)
    roots = np.where(np.isin(roots, space.wires), roots, -1)
    axes = [i for i in range(roots.ndim) if (roots != roots.take([0], i)).any()]
    if len(axes) != 1:
        return "has its channels along several axes"
    row = roots[tuple(slice(None) if i == axes[0] else 0 for i in range(roots.ndim))]
    return _runs(row, space, axes[0], extra)


def of_placement(placement: Placement, space: Space, extra: int) -> Grown | str:
    """How a weight grows."""
    use = placement.use
    assert use.weight is not None
    shape = tuple(use.weight.meta["val"].shape)
    if use.view is None or use.view == shape:
        row = np.full(shape[use.axis], -1)
        row[placement.positions] = space.wires
        return _runs(row, space, use.axis, extra)
    table = np.full(use.view, -1)
    np.moveaxis(table, use.axis, -1)[..., placement.positions] = space.wires
    table = table.reshape(shape)
    axes = [i for i in range(table.ndim) if (table != table.take([0], i)).any()]
    if len(axes) != 1:
        return "has its channels along several axes"
    return _runs(table[tuple(slice(None) if i == axes[0] else 0 for i in range(table.ndim))], space, axes[0], extra)


def _runs(row: Ids, space: Space, axis: int, extra: int) -> Grown | str:
    """Where the space's channels stand on an axis, each copy of them in one run and in order."""
    starts = np.nonzero(row == space.wires[0])[0]
    whole = all(np.array_equal(row[s : s + space.width], space.wires) for s in starts)
    if not whole or int((row >= 0).sum()) != len(starts) * space.width:
        return "has its channels in another order, or in turn with others"
    return axis, Growth(len(row), tuple(map(int, starts)), space.width, extra)
