"""Wires: one number for each element along the feature axes of each tensor, and which of them must move together.

A transformation acts on a vector of wires x by x ← T·x. Four questions are asked of every pair of wires, each about
another kind of T, and each kept in a forest of its own (`Level`). Wires in one tree are one *class*: T moves them by
the same row. Classes that always occur together, in the same rows of the same operators, have the same *signature*:
they are a space that T may mix.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np
from torch import fx

from qcompile.spaces.forest import Edge, Forest, Ids, with_room
from qcompile.spaces.sites import Keys, Sites, mix, ranks, run


class Level(IntEnum):
    """What a transformation may be, from the smallest group to the largest."""

    PERMUTATION = 0
    DIAGONAL = 1  # positive
    ORTHOGONAL = 2
    LINEAR = 3  # any invertible T; norms end such a space, they do not carry it on


MIXING = (Level.PERMUTATION, Level.ORTHOGONAL, Level.LINEAR)  # T exchanges or mixes wires: they need a signature
VECTOR = (Level.ORTHOGONAL, Level.LINEAR)
EVERY = tuple(Level)


@dataclass(frozen=True)
class Limit:
    """The operator that forbids a kind of transformation, and why."""

    node: fx.Node
    reason: str

    def __str__(self) -> str:
        return f"{self.node.name}: {self.reason}"


@dataclass
class Wires:
    """All wires of a program and what is known of them."""

    node: fx.Node  # where the walk is
    room: int = 0  # for how many wires to take address space at once; there may be more
    count: int = 0
    instances: int = 0
    instance: Ids = field(init=False)  # wires of one vector at one position share it
    events: list[Limit] = field(default_factory=list)
    _alike: Forest = field(init=False)  # what moves alike at every level
    _scales: Forest = field(init=False)  # the forest of diagonals
    _edges: dict[Level, list[Edge]] = field(default_factory=lambda: {level: [] for level in MIXING})  # besides `_alike`
    _copies: list[Edge] = field(default_factory=list)
    _forests: dict[Level, Forest] = field(default_factory=dict)  # made when asked for, until more is joined
    _sites: dict[tuple[Level, ...], Sites] = field(default_factory=dict)  # where wires occur, for these levels
    _rows: Sites = field(default_factory=Sites)  # in which rows of operators they were
    _limits: dict[Level, list[tuple[Ids, int]]] = field(default_factory=lambda: {level: [] for level in EVERY})

    def __post_init__(self) -> None:
        self.instance = np.zeros(self.room, np.int64)
        self._alike, self._scales = Forest(room=self.room), Forest(signed=True, room=self.room)

    def fresh(self, vectors: Ids) -> Ids:
        """New wires in the shape of `vectors`, whose numbers say which of them are elements of one vector."""
        if vectors.size == 0:
            return np.empty(vectors.shape, np.int64)
        have, self.count = self.count, self.count + vectors.size
        self._forests.clear()
        for forest in (self._alike, self._scales):
            forest.grow(self.count)
        self.instance = with_room(self.instance, self.count)
        numbers = ranks(vectors.ravel())
        self.instance[have : self.count] = self.instances + numbers
        self.instances += int(numbers.max()) + 1
        return np.arange(have, self.count).reshape(vectors.shape)

    def beside(self, ids: Ids) -> Ids:
        """New wires in the places of `ids`, elements of as many vectors; -1 where there is no wire."""
        there = ids >= 0
        if there.all():
            return self.fresh(self.instance[ids])
        return np.where(there, self.fresh(np.where(there, self.instance[ids], -1)), -1)

    def join(self, a: Ids, b: Ids, levels: tuple[Level, ...] = EVERY) -> None:
        """T moves a[i] and b[i] alike. Entries of -1 are no wires and are passed over."""
        edge = _wired(a, b)
        self._forests.clear()
        if levels == EVERY:
            self._alike.join(*edge)
        else:
            for level in MIXING:
                if level in levels:
                    self._edges[level].append(edge)
        if Level.DIAGONAL in levels:
            clash = self._scales.join(*edge)
            if clash.size:
                self.limit((Level.DIAGONAL,), clash, self.event(self.node, "its scale would be its own inverse"))

    def invert(self, a: Ids, b: Ids, event: int) -> None:
        """The scales of a[i] and b[i] are each other's inverse; where that is a circle, they are pinned."""
        clash = self._scales.join(*_wired(a, b), inverse=True)
        self.limit((Level.DIAGONAL,), clash, event)

    def event(self, node: fx.Node, reason: str) -> int:
        """A place in the program that restricts; its number."""
        self.events.append(Limit(node, reason))
        return len(self.events) - 1

    def together(self, levels: tuple[Level, ...], ids: Ids, event: int, rows: Ids | int = 0) -> None:
        """Only wires of one row (and of one vector) may be mixed with each other."""
        kept = ids >= 0
        flat = ids.ravel() if kept.all() else ids[kept]
        where, numbers = run(flat), np.asarray(rows, np.int64)
        keys = mix(_distinct(numbers).astype(np.uint64) + np.uint64((event + 1) << 32))
        keys = keys.ravel() if keys.size == 1 else np.broadcast_to(keys, ids.shape)[kept]
        if numbers.size > 1:
            self._rows.add(where, mix(keys))
        mixing = tuple(level for level in levels if level in MIXING)
        if mixing and flat.size:
            self._sites.setdefault(mixing, Sites()).add(where, self._of_vectors(keys, self.instance[where]))
        if Level.DIAGONAL in levels:
            self._sites.setdefault((Level.DIAGONAL,), Sites()).add(where, keys)

    def _of_vectors(self, keys: Keys, vectors: Ids) -> Keys:
        """Keys that differ from vector to vector."""
        low, high = int(vectors.min()), int(vectors.max())
        if low == high:
            return mix(keys ^ np.uint64(low))
        if keys.size == 1 and high - low < vectors.size // 4:
            return mix(keys ^ np.arange(low, high + 1, dtype=np.uint64))[vectors - low]
        return mix(keys ^ vectors.astype(np.uint64))

    def same_copy(self, a: Ids, b: Ids) -> None:
        """a[i] and b[i] stand in the same place of the same copy of a vector: what parts one parts the other."""
        self._copies.append(_wired(a, b))

    def part(self, ids: Ids, event: int, number: int) -> None:
        """These wires are one of several operands: two halves of a vector that are multiplied are no longer one."""
        where = run(ids[ids >= 0])
        once = where if isinstance(where, slice) else np.unique(where)
        self._rows.add(once, mix(np.array([(event << 8) + number], np.uint64)))

    def vectors(self) -> Callable[[Ids], Keys]:
        """What gives each wire a number that it shares with the wires of its vector that were in the same rows."""
        copy = Forest.of(self.count, self._copies).parent
        rows = np.zeros(self.count, np.uint64)
        self._rows.sums(copy, rows)
        step = np.uint64(0x9E3779B97F4A7C15)  # rows are sums of hashes: no two differ by so regular a number
        return lambda ids: rows[copy[ids]] + self.instance[ids].astype(np.uint64) * step

    def limit(self, levels: tuple[Level, ...], ids: Ids, event: int) -> None:
        """Nothing of these kinds may act on these wires."""
        kept = ids >= 0
        flat = ids.ravel() if kept.all() else ids[kept]
        if flat.size:
            for level in levels:
                self._limits[level].append((flat, event))

    def first_limits(self, level: Level) -> Ids:
        """For each class, at its root, the first event that limits it at `level`; -1 where none does."""
        found = np.full(self.count, -1, np.int32)
        forest = self._scales if level is Level.DIAGONAL else self.forest(level)
        for ids, event in sorted(self._limits[level], key=lambda limit: -limit[1]):  # the first is written last
            found[forest.find(ids)] = event
        return found

    def limited(self, level: Level) -> Ids:
        """For each wire, the first event that limits its class at `level`; -1 where none does."""
        return self.first_limits(level)[self.roots(level)]

    def restricted(self, level: Level) -> list[tuple[Ids, int]]:
        """Wires and the event that limits them, in program order."""
        return self._limits[level]

    def forest(self, level: Level) -> Forest:
        """The classes at a level, every parent a root."""
        if level is Level.DIAGONAL or not self._edges[level]:
            found = self._scales if level is Level.DIAGONAL else self._alike
            found.flatten()
            return found
        if level not in self._forests:
            self._forests[level] = Forest.of(self.count, self._edges[level], self._alike)
        return self._forests[level]

    def roots(self, level: Level) -> Ids:
        """The class of every wire."""
        return self.forest(level).parent[: self.count]

    def signatures(self, level: Level) -> Keys:
        """For each class, at its root, a number that it shares with those that occur wherever it does."""
        signature, roots = np.zeros(self.count, np.uint64), self.roots(level)
        for levels, sites in self._sites.items():
            if level in levels:
                sites.sums(roots, signature)
        return signature


def _wired(a: Ids, b: Ids) -> Edge:
    """The pairs of which both are wires, flat."""
    a, b = np.broadcast_arrays(a, b)
    both = (a >= 0) & (b >= 0)
    return (a.ravel(), b.ravel()) if both.all() else (a[both], b[both])


def _distinct(x: Ids) -> Ids:
    """One entry along each axis that `x` was broadcast along."""
    return x[tuple(slice(None) if step else slice(1) for step in x.strides)]
