"""Step functions of a float, read off its bit pattern: exact at every threshold, and no compares."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from qcompile.errors import SpecError

Step: TypeAlias = tuple[float, bool]
"""A magnitude (a float32 value) where the function rises by one, and whether the magnitude itself is already above."""

FLOAT_LAYOUT = {torch.float32: (torch.int32, 23, 127), torch.float64: (torch.int64, 52, 1023)}
"""Of each float dtype that elements take: the integer dtype of its patterns, its fraction bits, its exponent bias."""


@dataclass(frozen=True, eq=False)
class Staircase:
    """An integer function of a float's sign and magnitude that rises by one at each step, away from zero.

    `positive` and `negative` are the steps of floats with the sign bit clear and set, by ascending magnitude; `start`
    the levels of 0.0 and -0.0, at least 0. The last level reaches to infinity; that of nan means nothing.

    A bin is the floats that share sign, exponent and leading fraction bits. Bins are made small enough to hold one step
    each, so that `(pattern + table[bin]) >> shift` is the level: the addition carries from the step on.
    """

    positive: tuple[Step, ...]
    negative: tuple[Step, ...]
    start: tuple[int, int]

    def __call__(self, y: Tensor) -> Tensor:
        """The level of each entry of `y` (float32 or float64, any shape): int32 or int64, contiguous, in its shape."""
        integer, _, _ = FLOAT_LAYOUT[y.dtype]
        table, shift = _table(self, y.dtype, y.device)
        pattern = y.contiguous().view(integer).reshape(-1)
        bins = torch.bitwise_right_shift(pattern, shift).bitwise_and_(table.numel() - 1)
        levels = table.index_select(0, bins).add_(pattern).bitwise_right_shift_(shift + 1)
        return levels.view(y.shape)


def require_float(y: Tensor, element: object) -> None:
    """SpecError unless `y` is of a dtype that elements take."""
    if y.dtype not in FLOAT_LAYOUT:
        raise SpecError(f"{element} is made from float32 or float64, not {y.dtype}; convert the tensor first")


def nan_mask(y: Tensor) -> Tensor | None:
    """Where `y` is nan; None where it is nowhere."""
    # One cheap pass: a nan makes the sum nan, and only overflow or infinities of both signs do so too.
    if not math.isnan(y.sum().item()):
        return None
    mask = y.isnan()
    return mask if bool(mask.any()) else None


@functools.lru_cache(maxsize=256)
def _table(stairs: Staircase, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, int]:
    """What to add to a pattern, by bin, and the shift that leaves the bin of a pattern."""
    integer, fraction, _ = FLOAT_LAYOUT[dtype]
    # Kept for later calls, which may be of another mode.
    with torch.inference_mode(False), torch.device("cpu"):
        sides = [_patterns(steps, dtype) for steps in (stairs.positive, stairs.negative)]
        shift = _bin_shift(sides, fraction)
        halves = [_half(side, start, shift, integer) for side, start in zip(sides, stairs.start, strict=True)]
        table = torch.cat([halves[0], halves[1] - torch.iinfo(integer).min])
        return table.to(integer).to(device), shift


def _patterns(steps: tuple[Step, ...], dtype: torch.dtype) -> Tensor:
    """The first pattern above each step, int64, for floats of `dtype`."""
    integer, _, _ = FLOAT_LAYOUT[dtype]
    magnitudes = torch.tensor([at for at, _ in steps], dtype=torch.float32).to(dtype).view(integer).long()
    return magnitudes + torch.tensor([0 if included else 1 for _, included in steps], dtype=torch.int64)


def _bin_shift(sides: list[Tensor], fraction: int) -> int:
    """The largest shift under which no two steps of a side share a bin; levels up to 511 fit above it."""
    for kept in range(2, 10):
        shift = fraction - kept
        if all(a >> shift < b >> shift for side in sides for a, b in itertools.pairwise(side.tolist())):
            return shift
    raise SpecError("two thresholds lie within 1/512 of each other, relatively; leave out one of their values")


def _half(first: Tensor, start: int, shift: int, integer: torch.dtype) -> Tensor:
    """The table's entries for one sign, by bin: int64, right modulo the width of `integer`."""
    bins = torch.arange((torch.iinfo(integer).max >> shift) + 1)
    below = torch.searchsorted(first, bins << shift)
    # Where a bin holds no step, one at its end changes nothing.
    step = (bins + 1) << shift
    step[first >> shift] = first
    return ((start + below + 1) << (shift + 1)) - step
