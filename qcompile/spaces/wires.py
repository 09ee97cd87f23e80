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
from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray
from torch import fx

Ids: TypeAlias = NDArray[np.int64]
Keys: TypeAlias = NDArray[np.uint64]
Edge: TypeAlias = tuple[Ids, Ids]  # flat; a[i] and b[i] belong together
Number = TypeVar("Number", bound=np.generic)


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


class Forest:
    """Union-find over arrays of wires: the root of a tree is its first wire.

    With `signed`, an edge may say that one scale is the inverse of the other's.
    """

    def __init__(self, signed: bool = False, room: int = 0) -> None:
        self.count = 0
        self.parent: Ids = np.zeros(room, np.int64)
        self.sign: NDArray[np.int8] | None = np.zeros(room, np.int8) if signed else None
        self.flat = True  # every parent is a root

    @classmethod
    def of(cls, count: int, edges: list[Edge], start: Forest | None = None) -> Forest:
        """The trees of `count` wires that `edges` join, on top of those of `start`; every parent is a root."""
        forest = cls()
        if start is not None:
            start.flatten()
        forest.parent = np.arange(count) if start is None else start.parent[:count].copy()
        forest.count = count
        for a, b in edges:
            forest.join(a, b)
        forest.flatten()
        return forest

    def grow(self, count: int) -> None:
        """Make room for wires up to `count`; new ones are trees of their own."""
        have = self.count
        if count > have:
            self.parent = with_room(self.parent, count)
            self.parent[have:count] = np.arange(have, count)
            if self.sign is not None:
                self.sign = with_room(self.sign, count)
                self.sign[have:count] = 1
            self.count = count

    def find(self, ids: Ids) -> Ids:
        """The root of each wire."""
        return self.find_signed(ids)[0]

    def find_signed(self, ids: Ids) -> tuple[Ids, NDArray[np.int8] | None]:
        """The root of each wire, and the exponent (1 or -1) of the root's scale that the wire's is."""
        root = self.parent[ids]
        sign = None if self.sign is None else self.sign[ids]
        if self.flat:
            return root, sign
        moved = False
        while not np.array_equal(above := self.parent[root], root):
            if sign is not None and self.sign is not None:
                sign = sign * self.sign[root]
            root, moved = above, True
        if moved:
            self.parent[ids] = root
            if sign is not None and self.sign is not None:
                self.sign[ids] = sign
        return root, sign

    def flatten(self) -> None:
        """Make every parent a root."""
        parent = self.parent[: self.count]
        low = None if self.flat else np.nonzero(parent[parent] != parent)[0]
        if low is not None and low.size:
            self.find_signed(low)
        self.flat = True

    def join(self, a: Ids, b: Ids, inverse: bool = False) -> Ids:
        """Put a[i] and b[i] in one tree; returns the roots of wires that would be the inverse of themselves."""
        a, b = a.ravel(), b.ravel()
        while True:
            (ra, ea), (rb, eb) = self.find_signed(a), self.find_signed(b)
            apart = ra != rb
            if not apart.any():
                break
            whole = bool(apart.all())
            low, high = np.minimum(ra, rb), np.maximum(ra, rb)
            self.parent[high if whole else high[apart]] = low if whole else low[apart]
            self.flat = False
            if self.sign is not None and ea is not None and eb is not None:
                between = ea * eb * np.int8(-1 if inverse else 1)
                self.sign[high if whole else high[apart]] = between if whole else between[apart]
        if ea is None or eb is None:
            return np.empty(0, np.int64)
        return np.asarray(ra[ea * eb != (-1 if inverse else 1)])


@dataclass
class Wires:
    """All wires of a program and what is known of them."""

    node: fx.Node  # where the walk is
    room: int = 0  # for how many wires to take address space at once; there may be more
    count: int = 0
    instances: int = 0
    instance: Ids = field(init=False)  # wires of one vector at one position share it
    row: Keys = field(init=False)  # which rows of operators a wire was in
    events: list[Limit] = field(default_factory=list)
    _alike: Forest = field(init=False)  # what moves alike at every level
    _scales: Forest = field(init=False)  # the forest of diagonals
    _edges: dict[Level, list[Edge]] = field(default_factory=lambda: {level: [] for level in MIXING})  # besides `_alike`
    _copies: list[Edge] = field(default_factory=list)
    _forests: dict[Level, Forest] = field(default_factory=dict)  # made when asked for, until more is joined
    _sums: dict[tuple[Level, ...], Keys] = field(default_factory=dict)  # for each wire, of the keys of where it occurs
    _limits: dict[Level, list[tuple[Ids, int]]] = field(default_factory=lambda: {level: [] for level in EVERY})

    def __post_init__(self) -> None:
        self.instance, self.row = np.zeros(self.room, np.int64), np.zeros(self.room, np.uint64)
        self._alike, self._scales = Forest(room=self.room), Forest(signed=True, room=self.room)

    def fresh(self, vectors: Ids) -> Ids:
        """New wires in the shape of `vectors`, whose numbers say which of them are elements of one vector."""
        if vectors.size == 0:
            return np.empty(vectors.shape, np.int64)
        have, self.count = self.count, self.count + vectors.size
        self._forests.clear()
        for forest in (self._alike, self._scales):
            forest.grow(self.count)
        self.instance, self.row = with_room(self.instance, self.count), with_room(self.row, self.count)
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
        where = np.asarray(rows, np.int64)
        keys = mix(_distinct(where).astype(np.uint64) + np.uint64((event + 1) << 32))
        keys = keys.ravel() if keys.size == 1 else np.broadcast_to(keys, ids.shape)[kept]
        if where.size > 1:
            np.add.at(self.row, flat, mix(keys))
        mixing = tuple(level for level in levels if level in MIXING)
        if mixing:
            self._occur(mixing, flat, self._of_vectors(keys, flat))
        if Level.DIAGONAL in levels:
            self._occur((Level.DIAGONAL,), flat, keys)

    def _of_vectors(self, keys: Keys, ids: Ids) -> Keys:
        """Keys that differ from vector to vector."""
        vectors = self.instance[ids]
        if keys.size == 1 and ids.size:
            low, high = int(vectors.min()), int(vectors.max())
            if high - low < ids.size // 4:
                return mix(keys ^ np.arange(low, high + 1, dtype=np.uint64))[vectors - low]
        return mix(keys ^ vectors.astype(np.uint64))

    def _occur(self, levels: tuple[Level, ...], ids: Ids, keys: Keys) -> None:
        if levels not in self._sums:
            self._sums[levels] = np.zeros(self.room, np.uint64)
        sums = self._sums[levels] = with_room(self._sums[levels], self.count)
        np.add.at(sums, ids, keys)

    def same_copy(self, a: Ids, b: Ids) -> None:
        """a[i] and b[i] stand in the same place of the same copy of a vector: what parts one parts the other."""
        self._copies.append(_wired(a, b))

    def part(self, ids: Ids, event: int, number: int) -> None:
        """These wires are one of several operands: two halves of a vector that are multiplied are no longer one."""
        self.row[ids[ids >= 0]] += mix(np.array([(event << 8) + number], np.uint64))  # once for each wire

    def vectors(self) -> Callable[[Ids], Keys]:
        """What gives each wire a number that it shares with the wires of its vector that were in the same rows."""
        copy = Forest.of(self.count, self._copies).parent
        rows = np.zeros(self.count, np.uint64)
        np.add.at(rows, copy, self.row[: self.count])
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
        found = np.full(self.count, -1, np.int64)
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
        for levels, sums in self._sums.items():
            if level in levels:
                have = min(len(sums), self.count)  # wires that came later occur nowhere yet
                np.add.at(signature, roots[:have], sums[:have])
        return signature


def _wired(a: Ids, b: Ids) -> Edge:
    """The pairs of which both are wires, flat."""
    a, b = np.broadcast_arrays(a, b)
    both = (a >= 0) & (b >= 0)
    return (a.ravel(), b.ravel()) if both.all() else (a[both], b[both])


def _distinct(x: Ids) -> Ids:
    """One entry along each axis that `x` was broadcast along."""
    return x[tuple(slice(None) if step else slice(1) for step in x.strides)]


def with_room(array: NDArray[Number], count: int) -> NDArray[Number]:
    """The same entries, with zeros behind them, for `count` or more; a longer array at least doubles."""
    if count <= len(array):
        return array
    longer = np.zeros(max(count, 2 * len(array), 4096), array.dtype)
    longer[: len(array)] = array
    return longer


def ranks(values: Ids) -> Ids:
    """The place of each value among the distinct ones, in order."""
    low, high = int(values.min()), int(values.max())
    if low == high:
        return np.zeros(values.size, np.int64)
    if high - low >= 8 * values.size + 1024:
        return np.unique(values, return_inverse=True)[1].ravel()
    there = np.zeros(high - low + 1, np.int64)
    there[values - low] = 1
    return np.asarray((np.cumsum(there) - 1)[values - low])


def mix(x: Keys) -> Keys:
    """A hash of each number (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = np.asarray(x + np.uint64(0x9E3779B97F4A7C15))
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            x ^= x >> np.uint64(shift)
            x *= np.uint64(factor)
        x ^= x >> np.uint64(31)
        return x
