"""`Space`: channels that one transformation may act on, and where it meets weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.spaces.walk import Use
from qcompile.spaces.wires import Ids, Keys, Level


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
        """Whether a norm reads it, or several products add up to it and several read it: a residual stream."""
        makers = [p for p in self.sources if p.node is not p.use.weight]  # a bias is no maker
        return bool(self.of_kind("norm")) or (len(makers) > 1 and len(self.sinks) > 1)

    @property
    def is_state(self) -> bool:
        """Whether a cache holds it."""
        return bool(self.of_kind("state"))


@dataclass(frozen=True, eq=False)
class Groups:
    """Classes that may be mixed with each other, group by group, each in ascending order."""

    members: Ids  # classes, one group after the other
    starts: Ids  # where each group starts in `members`, and the end of the last
    index: Ids  # where each wire's class is in `members`; -1 where it is in no group

    @classmethod
    def of(cls, classes: Ids, signature: Keys, count: int) -> Groups:
        """Group `classes` (sorted) of `count` wires by their signature."""
        keys = signature[classes]
        order = np.argsort(keys, kind="stable")
        members, keys = classes[order], keys[order]
        starts = np.append(np.nonzero(np.append(True, keys[1:] != keys[:-1]))[0], len(keys))
        index = np.full(count, -1, np.int64)
        index[members] = np.arange(len(members))
        return cls(members, starts, index)

    def group(self, number: int) -> Ids:
        """The classes of one group."""
        return self.members[self.starts[number] : self.starts[number + 1]]


def placements(
    use: Use, groups: Groups, roots: Ids, vectors: Ids, sign: NDArray[np.int8] | None
) -> Iterator[tuple[int, Placement | None]]:
    """Where groups stand in a use; None for one whose copies there do not line up.

    `roots`, `vectors` and `sign` are of all wires. One copy of a group is wires of one vector, each class once; where a
    vector has a class twice, it is not known which channels go together. With a `sign`, for diagonals, that does not
    matter: each class is scaled by itself.
    """
    positions = np.nonzero(use.ids >= 0)[0]
    at = groups.index[roots[use.ids[positions]]]
    positions, at = positions[at >= 0], at[at >= 0]
    if at.size == 0:
        return
    group = np.searchsorted(groups.starts, at, "right") - 1
    slot, vector = at - groups.starts[group], vectors[use.ids[positions]]
    if sign is not None:
        vector = np.zeros_like(vector)
    order = np.lexsort((slot, vector, group))
    slot, vector, group, positions = slot[order], vector[order], group[order], positions[order]
    new = np.append(True, (slot[1:] != slot[:-1]) | (vector[1:] != vector[:-1]) | (group[1:] != group[:-1]))
    each = np.arange(len(slot))
    turn = each - np.maximum.accumulate(np.where(new, each, 0))  # how often this vector had this class before
    if turn.any():
        order = np.lexsort((slot, turn, vector, group))
        slot, group, positions, turn = slot[order], group[order], positions[order], turn[order]
    first = np.nonzero(np.append(True, group[1:] != group[:-1]))[0]
    numbers, ends = group[first], np.append(first[1:], len(group))
    widths = (groups.starts[1:] - groups.starts[:-1])[numbers]
    start, width = (np.repeat(x, ends - first) for x in (first, widths))
    column = (each - start) % width
    fits = np.logical_and.reduceat(slot == column, first) & ((ends - first) % widths == 0)
    if sign is None:
        fits &= ~np.logical_or.reduceat(turn > 0, first)
    inverse = None if sign is None else sign[use.ids[positions]] < 0
    for number, a, b, wide, fit in zip(*(x.tolist() for x in (numbers, first, ends, widths, fits)), strict=True):
        if not fit:
            yield number, None
            continue
        copies = positions[a:b].reshape(-1, wide)
        order = np.argsort(copies[:, 0])
        flip = None if inverse is None else inverse[a:b].reshape(-1, wide)[order]
        yield number, Placement(use, copies[order], flip)
