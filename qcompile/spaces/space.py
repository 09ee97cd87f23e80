"""`Space`: channels that one transformation may act on, and where it meets weights."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.spaces.walk import Use
from qcompile.spaces.wires import Ids, Level


@dataclass(frozen=True, eq=False)
class Placement:
    """A space in one use: `positions[c, j]` is where copy c has channel j along the axis of the weight.

    `inverse[c, j]`: where T is diagonal, whether this channel's factor is the inverse of the space's.
    """

    use: Use
    positions: Ids  # [copies, width]
    inverse: NDArray[np.bool_] | None = None

    @property
    def node(self) -> fx.Node:
        """The operator, or the weight itself where it is no operand of a product."""
        return self.use.node


@dataclass(frozen=True, eq=False)
class Space:
    """Channels 0 … width-1, in the order in which the first source makes them."""

    level: Level
    width: int
    placements: tuple[Placement, ...]
    wires: Ids = field(repr=False)  # the class of each channel

    @property
    def sources(self) -> list[Placement]:
        """Where T multiplies a weight: ``W ← T·W``."""
        return [p for p in self.placements if p.use.kind == "source"]

    @property
    def sinks(self) -> list[Placement]:
        """Where T is undone in a weight: ``W ← W·T⁻¹``."""
        return [p for p in self.placements if p.use.kind == "sink"]

    def of_kind(self, *kinds: str) -> list[Placement]:
        """Placements in uses of some kinds."""
        return [p for p in self.placements if p.use.kind in kinds]

    @property
    def name(self) -> str:
        """Where it starts and ends: the weights of its first source and its last sink."""
        ends = [p.use.weight.meta["weight"] for p in (*self.sources[:1], *self.sinks[-1:]) if p.use.weight is not None]
        return " … ".join(dict.fromkeys(ends))

    @property
    def is_stream(self) -> bool:
        """Whether a norm reads it, or several sources add up to it and several sinks read it: a residual stream."""
        return bool(self.of_kind("norm")) or (len(self.sources) > 1 and len(self.sinks) > 1)

    @property
    def is_state(self) -> bool:
        """Whether a cache holds it."""
        return bool(self.of_kind("state"))


def placed(use: Use, wires: Ids, roots: Ids, instance: Ids, sign: NDArray[np.int8] | None) -> Placement | None:
    """Where the classes `wires` (sorted) stand in a use; None where its copies of them do not line up.

    `roots` and `sign` are of the use's own wires. One copy of the space is wires of one vector, each class once.
    """
    slots = np.searchsorted(wires, roots)
    slots[slots == len(wires)] = 0
    positions = np.nonzero((wires[slots] == roots) & (use.ids >= 0))[0]
    slot, vector = slots[positions], instance[use.ids[positions]]
    order = np.lexsort((positions, slot, vector))
    slot, vector, positions = slot[order], vector[order], positions[order]
    new = np.ones(len(slot), bool)
    new[1:] = (slot[1:] != slot[:-1]) | (vector[1:] != vector[:-1])
    starts = np.maximum.accumulate(np.where(new, np.arange(len(slot)), 0))
    turn = np.arange(len(slot)) - starts  # how often this vector had this class before
    order = np.lexsort((slot, turn, vector))
    slot, positions, turn = slot[order], positions[order], turn[order]
    width = len(wires)
    if len(slot) % width or not np.array_equal(
        slot.reshape(-1, width), np.broadcast_to(np.arange(width), (len(slot) // width, width))
    ):
        return None
    places = positions.reshape(-1, width)
    if turn.any() and not _shifted(places):
        return None
    inverse = None if sign is None else (sign[places] < 0)
    return Placement(use, places, inverse)


def _shifted(places: Ids) -> bool:
    """Whether all copies are one pattern at different places, so that none takes its channels from two positions."""
    return bool((places - places[:, :1] == places[0] - places[0, 0]).all())
