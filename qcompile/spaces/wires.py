"""Wires: one number for each element along the feature axes of each tensor, and which of them must move together.

A transformation acts on a vector of wires x by x ← T·x. Four questions are asked of every pair of wires, each about
another kind of T, and each kept in a forest of its own (`Level`). Wires in one tree are one *class*: T moves them by
the same row. Classes that always occur together, in the same rows of the same operators, have the same *signature*:
they are a space that T may mix.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import IntEnum
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import fx

Ids: TypeAlias = NDArray[np.int64]
Keys: TypeAlias = NDArray[np.uint64]


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
    """Union-find over arrays of wires. With `signed`, an edge may say that one scale is the inverse of the other's."""

    def __init__(self, signed: bool = False) -> None:
        self.parent: Ids = np.empty(0, np.int64)
        self.sign: NDArray[np.int8] | None = np.empty(0, np.int8) if signed else None
        self.flat = True  # every parent is a root

    def grow(self, count: int) -> None:
        """Make room for wires up to `count`; new ones are trees of their own."""
        have = len(self.parent)
        if count > have:
            wanted = max(count, 2 * have, 4096)
            self.parent = np.concatenate([self.parent, np.arange(have, wanted)])
            if self.sign is not None:
                self.sign = np.concatenate([self.sign, np.ones(wanted - have, np.int8)])

    def find(self, ids: Ids) -> Ids:
        """The root of each wire."""
        return self.find_signed(ids)[0]

    def find_signed(self, ids: Ids) -> tuple[Ids, NDArray[np.int8] | None]:
        """The root of each wire, and the exponent (1 or -1) of the root's scale that the wire's is."""
        root = self.parent[ids]
        if self.flat:
            return root, None if self.sign is None else self.sign[ids]
        if self.sign is None:
            while not np.array_equal(above := self.parent[root], root):
                root = above
            self.parent[ids] = root
            return root, None
        sign = self.sign[ids]
        while not np.array_equal(above := self.parent[root], root):
            sign = sign * self.sign[root]
            root = above
        self.parent[ids], self.sign[ids] = root, sign
        return root, sign

    def flatten(self) -> None:
        """Make every parent a root."""
        if not self.flat:
            self.find_signed(np.arange(len(self.parent)))
            self.flat = True

    def join(self, a: Ids, b: Ids, inverse: bool = False) -> Ids:
        """Put a[i] and b[i] in one tree; returns the roots of wires that would be the inverse of themselves."""
        a, b = a.ravel(), b.ravel()
        while True:
            (ra, ea), (rb, eb) = self.find_signed(a), self.find_signed(b)
            apart = ra != rb
            if not apart.any():
                break
            low, high = np.minimum(ra, rb)[apart], np.maximum(ra, rb)[apart]
            self.parent[high] = low
            self.flat = False
            if self.sign is not None and ea is not None and eb is not None:
                between = ea * eb * np.int8(-1 if inverse else 1)
                self.sign[high] = between[apart]
        if ea is None or eb is None:
            return np.empty(0, np.int64)
        return np.asarray(ra[ea * eb != (-1 if inverse else 1)])


@dataclass
class Wires:
    """All wires of a program and what is known of them."""

    node: fx.Node  # where the walk is
    count: int = 0
    instances: int = 0
    instance: Ids = field(default_factory=lambda: np.empty(0, np.int64))  # wires of one vector at one position share it
    row: Keys = field(default_factory=lambda: np.empty(0, np.uint64))  # which rows of operators a wire was in
    copies: Forest = field(default_factory=Forest)  # wires of one channel of one copy of a vector
    forests: dict[Level, Forest] = field(
        default_factory=lambda: {level: Forest(signed=level is Level.DIAGONAL) for level in EVERY}
    )
    events: list[Limit] = field(default_factory=list)
    _sites: dict[Level, list[tuple[Ids, Keys]]] = field(default_factory=lambda: {level: [] for level in EVERY})
    _limits: dict[Level, list[tuple[Ids, int]]] = field(default_factory=lambda: {level: [] for level in EVERY})

    def fresh(self, vectors: Ids) -> Ids:
        """New wires in the shape of `vectors`, whose numbers say which of them are elements of one vector."""
        if vectors.size == 0:
            return np.empty(vectors.shape, np.int64)
        ids = np.arange(self.count, self.count + vectors.size).reshape(vectors.shape)
        self.count += vectors.size
        for forest in (*self.forests.values(), self.copies):
            forest.grow(self.count)
        if self.count > len(self.instance):
            spare = max(self.count, 2 * len(self.instance), 4096) - len(self.instance)
            self.instance = np.concatenate([self.instance, np.full(spare, -1)])
            self.row = np.concatenate([self.row, np.zeros(spare, np.uint64)])
        numbers = ranks(vectors.ravel())
        self.instance[self.count - vectors.size : self.count] = self.instances + numbers
        self.instances += int(numbers.max()) + 1
        return ids

    def join(self, a: Ids, b: Ids, levels: tuple[Level, ...] = EVERY) -> None:
        """T moves a[i] and b[i] alike. Entries of -1 are no wires and are passed over."""
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0)
        for level in levels:
            clash = self.forests[level].join(a[both], b[both])
            if clash.size:
                self.limit((level,), clash, self.event(self.node, "its scale would be its own inverse"))

    def invert(self, a: Ids, b: Ids, event: int) -> None:
        """The scales of a[i] and b[i] are each other's inverse; where that is a circle, they are pinned."""
        both = (a >= 0) & (b >= 0)
        clash = self.forests[Level.DIAGONAL].join(a[both], b[both], inverse=True)
        self.limit((Level.DIAGONAL,), clash, event)

    def event(self, node: fx.Node, reason: str) -> int:
        """A place in the program that restricts; its number."""
        self.events.append(Limit(node, reason))
        return len(self.events) - 1

    def together(self, levels: tuple[Level, ...], ids: Ids, event: int, rows: Ids | int = 0) -> None:
        """Only wires of one row (and of one vector) may be mixed with each other."""
        flat = ids.ravel()
        kept = flat >= 0
        where = np.broadcast_to(np.asarray(rows, np.int64), ids.shape).ravel()[kept]
        flat = flat[kept]
        keys = mix(where.astype(np.uint64) + np.uint64((event + 1) << 32))
        if np.size(rows) > 1:
            np.add.at(self.row, flat, mix(keys))
        for level in levels:
            own = mix(keys ^ self.instance[flat].astype(np.uint64)) if level in MIXING else keys
            self._sites[level].append((flat, own))

    def same_copy(self, a: Ids, b: Ids) -> None:
        """a[i] and b[i] stand in the same place of the same copy of a vector: what parts one parts the other."""
        a, b = np.broadcast_arrays(a, b)
        both = (a >= 0) & (b >= 0)
        self.copies.join(a[both], b[both])

    def part(self, ids: Ids, event: int, number: int) -> None:
        """These wires are one of several operands: two halves of a vector that are multiplied are no longer one."""
        flat = np.unique(ids[ids >= 0])
        self.row[flat] += mix(np.array([(event << 8) + number], np.uint64))

    def vectors(self) -> Ids:
        """For each wire, a number that it shares with the wires of its vector that were in the same rows."""
        copy = self.copies.find(np.arange(self.count))
        rows = np.zeros(self.count, np.uint64)
        np.add.at(rows, copy, self.row[: self.count])
        return mix(rows[copy] ^ mix(self.instance[: self.count].astype(np.uint64))).view(np.int64)

    def limit(self, levels: tuple[Level, ...], ids: Ids, event: int) -> None:
        """Nothing of these kinds may act on these wires."""
        flat = ids[ids >= 0].ravel()
        if flat.size:
            for level in levels:
                self._limits[level].append((flat, event))

    def limited(self, level: Level) -> Ids:
        """For each wire, the first event that limits its class at `level`; -1 where none does."""
        found = np.full(self.count, -1, np.int64)
        limits = sorted(self._limits[level], key=lambda limit: -limit[1])  # the first event is written last, and stays
        if limits:
            forest = self.forests[level]
            forest.flatten()
            roots = forest.find(np.concatenate([ids for ids, _ in limits]))
            found[roots] = np.repeat([event for _, event in limits], [len(ids) for ids, _ in limits])
        return found[self.roots(level)]

    def restricted(self, level: Level) -> list[tuple[Ids, int]]:
        """Wires and the event that limits them, in program order."""
        return self._limits[level]

    def roots(self, level: Level) -> Ids:
        """The class of every wire."""
        self.forests[level].flatten()
        return self.forests[level].parent[: self.count].copy()

    def signatures(self, level: Level, limited: Ids) -> Keys:
        """For each wire, a number that its class shares with those it may be mixed with, from what is `limited`."""
        signature = np.zeros(self.count, np.uint64)
        forest = self.forests[level]
        forest.flatten()
        for ids, keys in self._sites[level]:
            np.add.at(signature, forest.find(ids), keys)
        roots = self.roots(level)
        signature = signature[roots]
        alone = limited >= 0
        signature[alone] = mix(roots[alone].astype(np.uint64) ^ np.uint64(0x5BD1E995 << 24))
        return signature


def ranks(values: Ids) -> Ids:
    """The place of each value among the distinct ones, in order."""
    low, high = int(values.min()), int(values.max())
    if high - low >= 8 * values.size + 1024:
        return np.unique(values, return_inverse=True)[1].ravel()
    there = np.zeros(high - low + 1, np.int64)
    there[values - low] = 1
    return np.asarray((np.cumsum(there) - 1)[values - low])


def mix(x: Keys) -> Keys:
    """A hash of each number (the finaliser of SplitMix64, Steele et al. 2014)."""
    with np.errstate(over="ignore"):
        x = (x + np.uint64(0x9E3779B97F4A7C15)).astype(np.uint64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return np.asarray(x ^ (x >> np.uint64(31)))
