"""`Forest`: union-find over arrays of wires."""

from __future__ import annotations

from typing import TypeAlias, TypeVar

import numpy as np
from numpy.typing import NDArray

Ids: TypeAlias = NDArray[np.int64 | np.int32]  # wires, or -1 for none; forests keep them in four bytes each
Edge: TypeAlias = tuple[Ids, Ids]  # flat; a[i] and b[i] belong together
Number = TypeVar("Number", bound=np.generic)

_BLOCK = 1 << 16  # wires that are looked at together: what is read of them fits into a cache


class Forest:
    """Union-find over arrays of wires: the root of a tree is its first wire.

    With `signed`, an edge may say that one scale is the inverse of the other's.
    """

    def __init__(self, signed: bool = False, room: int = 0) -> None:
        self.count = 0
        self.parent: Ids = np.zeros(room, np.int32)
        self.sign: NDArray[np.int8] | None = np.zeros(room, np.int8) if signed else None
        self.flat = True  # every parent is a root

    @classmethod
    def of(cls, count: int, edges: list[Edge], start: Forest | None = None) -> Forest:
        """The trees of `count` wires that `edges` join, on top of those of `start`; every parent is a root."""
        forest = cls()
        if start is not None:
            start.flatten()
        forest.parent = np.arange(count, dtype=np.int32) if start is None else start.parent[:count].copy()
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
            self.parent[have:count] = np.arange(have, count, dtype=np.int32)
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
        if self.flat:
            return
        for start in range(0, self.count, _BLOCK):  # those in front are flat by then, and parents stand in front
            parent = self.parent[start : min(start + _BLOCK, self.count)]
            low = np.nonzero(self.parent[parent] != parent)[0]
            if low.size:
                self.find_signed(low + start)
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


def with_room(array: NDArray[Number], count: int) -> NDArray[Number]:
    """The same entries, with zeros behind them, for `count` or more; a longer array at least doubles."""
    if count <= len(array):
        return array
    longer = np.zeros(max(count, 2 * len(array), 4096), array.dtype)
    longer[: len(array)] = array
    return longer
