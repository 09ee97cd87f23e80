"""`Sites`: where wires meet something together, and the numbers that tell of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from qcompile.spaces.forest import Ids

Keys: TypeAlias = NDArray[np.uint64]
Where: TypeAlias = Ids | slice


@dataclass
class Sites:
    """Wires that met something, with a key for each row in which they did; or one key for all of them."""

    met: list[tuple[Where, Keys]] = field(default_factory=list)

    def add(self, where: Where, keys: Keys) -> None:
        """Wires were somewhere."""
        self.met.append((where, keys))

    def sums(self, roots: Ids, to: Keys) -> None:
        """Add the keys of all wires to those of their classes: those that occur together have the same sum."""
        for where, keys in self.met:
            np.add.at(to, roots[where], keys)


def run(ids: Ids) -> Where:
    """A slice where wires follow each other, which is read without a copy; else the wires."""
    if ids.size and ids[-1] - ids[0] == ids.size - 1 and bool((ids[1:] > ids[:-1]).all()):
        return slice(int(ids[0]), int(ids[-1]) + 1)
    return ids


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
