"""`Space`: channels that one transformation may act on, and where it meets weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray
from torch import fx

from qcompile.spaces.forest import Forest, Ids
from qcompile.spaces.sites import Keys
from qcompile.spaces.walk import Use
from qcompile.spaces.wires import Level


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


@dataclass(frozen=True, eq=False)
class Groups:
    """Classes that may be mixed with each other, group by group, each in ascending order."""

    members: Ids  # classes, one group after the other
    starts: Ids  # where each group starts in `members`, and the end of the last
    index: Ids  # where each wire's class is in `members`; -1 where it is in no group

    @classmethod
    def of(cls, classes: Ids, keys: Keys, least: int, count: int) -> Groups:
        """Group `classes` (sorted) of `count` wires by their keys, where `least` or more share one."""
        first = np.nonzero(np.append(True, keys[1:] != keys[:-1]))[0]  # of each run of equal keys: there are few
        lengths = np.diff(np.append(first, len(keys)))
        _, group = np.unique(keys[first], return_inverse=True)
        sizes = np.zeros(int(group.max()) + 1, np.int64)
        np.add.at(sizes, group, lengths)
        order = np.argsort(group, kind="stable")
        order = order[sizes[group[order]] >= least]
        first, lengths, sizes = first[order], lengths[order], sizes[sizes >= least]
        ends = np.cumsum(lengths)
        members = classes[np.repeat(first - ends + lengths, lengths) + np.arange(lengths.sum())]
        index = np.full(count, -1, np.int32)
        index[members] = np.arange(len(members))
        return cls(members, np.append(0, np.cumsum(sizes)), index)

    def group(self, number: int) -> Ids:
        """The classes of one group."""
        return self.members[self.starts[number] : self.starts[number + 1]]


def placements(
    use: Use, groups: Groups, forest: Forest, vectors: Callable[[Ids], Keys]
) -> Iterator[tuple[int, Placement | None]]:
    """Where groups stand in a use; None for one whose copies there do not line up.

    `forest` is of all wires, and `vectors` gives the numbers of theirs. One copy of a group is wires of one vector,
    each class once; where a vector has a class twice, it is not known which channels go together. In a signed forest,
    for diagonals, that does not matter: each class is scaled by itself.
    """
    positions = np.nonzero(use.ids >= 0)[0]
    roots, sign = forest.find_signed(use.ids[positions])
    at = groups.index[roots]
    inside = at >= 0
    if not inside.any():
        return
    if not inside.all():
        positions, at = positions[inside], at[inside]
        sign = None if sign is None else sign[inside]
    inverse = None if sign is None else sign < 0
    vector = vectors(use.ids[positions]) if sign is None else np.zeros(len(positions), np.uint64)
    in_order = _in_order(groups, at, vector)
    if in_order is not None:
        for number in in_order:
            a, b = (groups.starts[number : number + 2] - at[0]).tolist()
            yield number, Placement(use, positions[None, a:b], None if inverse is None else inverse[None, a:b])
        return
    yield from _sorted(use, groups, positions, at, vector, inverse)


def _in_order(groups: Groups, at: Ids, vector: Keys) -> range | None:
    """The groups that stand side by side, each once and in its own order, which most do."""
    if (at[1:] - at[:-1] != 1).any():
        return None
    first, last = np.searchsorted(groups.starts, at[[0, -1]], "right") - 1
    starts = groups.starts[first : last + 2]
    changes = at[1:][vector[1:] != vector[:-1]]
    if starts[0] != at[0] or starts[-1] != at[-1] + 1 or (starts[np.searchsorted(starts, changes)] != changes).any():
        return None
    return range(first, last + 1)


def _sorted(
    use: Use, groups: Groups, positions: Ids, at: Ids, vector: Keys, inverse: NDArray[np.bool_] | None
) -> Iterator[tuple[int, Placement | None]]:
    """Groups in any order, with any number of copies."""
    group = np.searchsorted(groups.starts, at, "right") - 1
    slot = at - groups.starts[group]
    order = np.lexsort((slot, vector, group))
    slot, vector, group = slot[order], vector[order], group[order]
    new = np.append(True, (slot[1:] != slot[:-1]) | (vector[1:] != vector[:-1]) | (group[1:] != group[:-1]))
    each = np.arange(len(slot))
    turn = each - np.maximum.accumulate(np.where(new, each, 0))  # how often this vector had this class before
    if turn.any():
        again = np.lexsort((slot, turn, vector, group))
        order, slot, vector, group, turn = order[again], slot[again], vector[again], group[again], turn[again]
    first = np.nonzero(np.append(True, group[1:] != group[:-1]))[0]
    numbers, ends = group[first], np.append(first[1:], len(group))
    widths = (groups.starts[1:] - groups.starts[:-1])[numbers]
    start, width = (np.repeat(x, ends - first) for x in (first, widths))
    column = (each - start) % width
    of_one = (column == 0) | np.append(True, vector[1:] == vector[:-1])
    fits = np.logical_and.reduceat((slot == column) & of_one, first) & ((ends - first) % widths == 0)
    if inverse is None:
        fits &= ~np.logical_or.reduceat(turn > 0, first)
    for number, a, b, wide, fit in zip(*(x.tolist() for x in (numbers, first, ends, widths, fits)), strict=True):
        if not fit:
            yield number, None
            continue
        chosen = order[a:b].reshape(-1, wide)
        chosen = chosen[np.argsort(chosen[:, 0])]  # positions ascend, so this is the order in which copies start
        yield number, Placement(use, positions[chosen], None if inverse is None else inverse[chosen])
