"""Searching for the scale with the least error in each group: the mse observer."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from qcompile.numerics.blocks import inner_axes, split, spread
from qcompile.numerics.criterion import LeastError
from qcompile.numerics.fit import Fit
from qcompile.numerics.quantize import round_steps
from qcompile.numerics.scale_type import E4M3Scale, E8M0Scale, Pow2Scale

RANGE_GRID = tuple(step / 50 for step in (*range(58, 50, -1), *range(49, 19, -1), 17, 14, 12, 10, 8, 6, 4, 3, 2))
"""What the range is multiplied by, after 1 has been tried: 1.16 to 0.40 in steps of 0.02, then down to 0.04 in coarser
ones. The first of equals wins.

Halving the step gains under 0.02 dB. A range that grows gains 0.1 dB at 4 bits and 0.3 to 0.8 dB at 8; one that shrinks
below 0.4 is for a few bits, and for outliers in wide groups.
"""

POW2_GRID = (2.0, 0.5, 4.0)
"""The same where scales are powers of two: the realisable neighbours."""

E4M3_GRID = tuple(side * offset for offset in range(1, 9) for side in (1, -1))
"""Codes above and below the first one, where scales are e4m3: an octave to both sides, the nearest first."""

GOLDEN_RANGE, GOLDEN_STEPS = (0.04, 1.2), 20
"""Golden-section search: the bracket, as shares of the range, and steps, in which it shrinks to 8e-5."""


def least_error(x: Tensor, fit: Fit, observer: LeastError) -> Fit:
    """Of the candidates for groups of `x` (float32 or float64), the one with the least error in each group."""

    def error(candidate: Fit) -> Tensor:
        return group_error(x, candidate, observer.norm)

    return search(fit, error, observer)


def search(fit: Fit, error: Callable[[Fit], Tensor], observer: LeastError) -> Fit:
    """The best candidate of each group; `error` gives the errors of one candidate, of the scale's shape."""
    return _golden(fit, error) if observer.golden else _grid(fit, error)


def candidates(fit: Fit) -> Iterator[Fit]:
    """Fits around `fit`, which comes first."""
    yield fit
    scale = fit.spec.scale
    if isinstance(scale, E8M0Scale):
        # Not Fit.scaled: a rule rounds the range, and the exponents next to its choice are what there is.
        yield from (fit.with_units((fit.units * factor).clamp(2.0**-127, 2.0**127)) for factor in POW2_GRID)
    elif isinstance(scale, E4M3Scale):
        code = fit.units.abs().to(torch.float8_e4m3fn).view(torch.uint8).to(torch.int16)
        for offset in E4M3_GRID:
            moved = (code + offset).clamp(1, 126).to(torch.uint8).view(torch.float8_e4m3fn).to(torch.float32)
            yield fit.with_units(torch.copysign(moved, fit.units))
    else:
        yield from map(fit.scaled, POW2_GRID if isinstance(scale, Pow2Scale) else RANGE_GRID)


def group_error(x: Tensor, fit: Fit, norm: float) -> Tensor:
    """The sum of |x - dequantized| ** norm in each group, of the scale's shape."""
    shape = fit.units.shape
    view, inner = split(x, shape), inner_axes(x.shape, shape)
    step = spread(fit.steps().to(x.dtype), x.shape)
    zero = None if fit.zero is None else spread(fit.zero, x.shape)
    error = round_steps(view, step, zero, fit.spec)
    if isinstance(fit.spec.scale, E8M0Scale | E4M3Scale):
        # Few candidates, so often equally good: in float64 rounding does not decide between them.
        error = error.mul_(step).to(torch.float64).sub_(view)
    else:
        error.mul_(step).sub_(view)
    error = error.square_() if norm == 2 else error.abs_().pow_(norm)
    return error.sum(inner).reshape(shape) if inner else error


def _grid(fit: Fit, error: Callable[[Fit], Tensor]) -> Fit:
    best, least = fit, error(fit)
    for index, candidate in enumerate(candidates(fit)):
        if index == 0:
            continue
        total = error(candidate)
        better = total < least
        least = torch.where(better, total, least)
        best = _choose(better, candidate, best)
    return best


def _golden(fit: Fit, error: Callable[[Fit], Tensor]) -> Fit:
    """Golden-section search on the range of every group at once. The best of all that is tried is kept."""
    ratio = (5**0.5 - 1) / 2
    low, high = (torch.full_like(fit.low, end) for end in GOLDEN_RANGE)
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    best, least = fit, error(fit)

    def tried(factor: Tensor, best: Fit, least: Tensor) -> tuple[Tensor, Fit, Tensor]:
        candidate = fit.scaled(factor)
        total = error(candidate)
        better = total < least
        return total, _choose(better, candidate, best), torch.where(better, total, least)

    at_left, best, least = tried(left, best, least)
    at_right, best, least = tried(right, best, least)
    for _ in range(GOLDEN_STEPS):
        lower = at_left <= at_right
        low, high = torch.where(lower, low, left), torch.where(lower, right, high)
        probe = torch.where(lower, high - ratio * (high - low), low + ratio * (high - low))
        total, best, least = tried(probe, best, least)
        left, right = torch.where(lower, probe, right), torch.where(lower, left, probe)
        at_left, at_right = torch.where(lower, total, at_right), torch.where(lower, at_left, total)
    return best


def _choose(better: Tensor, candidate: Fit, best: Fit) -> Fit:
    zero = best.zero
    if zero is not None and candidate.zero is not None:
        zero = torch.where(better, candidate.zero, zero)
    return best.at(torch.where(better, candidate.units, best.units), zero)
