"""Scales and zero-points from data.

Everything is computed in float32 (float64 for float64 data), rounded to the scale's type, and only then used, so that
codes are chosen against the scale that will be stored.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.blocks import inner_axes, rows, split, spread, tiles
from qcompile.numerics.criterion import LeastError, Percentile
from qcompile.numerics.quantize import float_codes, work_dtype
from qcompile.numerics.scale_type import is_pow2, round_scale
from qcompile.numerics.spec import QuantSpec

RANGE_GRID = (1.0, *(step / 50 for step in (*range(58, 50, -1), *range(49, 19, -1))))
"""What the mse observer multiplies the range by: 1, then 1.16 to 0.40 in steps of 0.02. The first of equals wins.

Halving the step gains under 0.02 dB. A range that grows gains 0.1 dB at 4 bits and 0.3 to 0.8 dB at 8.
"""

POW2_GRID = (1.0, 2.0, 0.5, 0.25)
"""The same where scales are powers of two: the realisable neighbours."""


def choose_qparams(x: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point (None where `spec` is symmetric) for `x`, of any float dtype and shape.

    Both have shape `spec.scale_shape(x.shape)`, dtypes `spec.scale_dtype` and `spec.zero_dtype`. A group of zeros, or
    an empty one, gets scale 1. Raises SpecError where a group does not divide, or where `x` holds nan or infinity.
    """
    work = work_dtype(x)
    shape = spec.scale_shape(x.shape)
    if x.numel() == 0:
        nothing = torch.zeros(shape, dtype=work, device=x.device)
        return qparams_from_range(nothing, nothing, spec, x.dtype)
    low, high = _extremes(x, shape)
    check_finite(low, high, x, spec)
    if isinstance(spec.observer, Percentile):
        low, high = _percentiles(x.to(work), low, high, spec)
    elif isinstance(spec.observer, LeastError):
        low, high = _least_error_range(x, low.to(work), high.to(work), spec, spec.observer.norm)
    return qparams_from_range(low.to(work), high.to(work), spec, x.dtype)


def check_finite(low: Tensor, high: Tensor, x: Tensor, spec: QuantSpec) -> None:
    """SpecError where the extremes of `x` show that it holds nan or infinity."""
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise SpecError(
            f"{spec}: the tensor (shape {list(x.shape)}) holds nan or infinity; find its source, or clamp it"
        )


def qparams_from_range(low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
    """Scale and zero-point of groups whose entries lie in [low, high] (float32 or float64, scale-shaped).

    Ranges within 1/128 of the largest finite value of `dtype`, that of the data, are pulled in, so that no code
    dequantizes to infinity.
    """
    reach = _reach(spec, dtype)
    low, high = low.clamp(-reach, reach), high.clamp(-reach, reach)
    if not spec.symmetric:
        return _asymmetric(low.clamp(max=0), high.clamp(min=0), spec)
    if not spec.signed:
        step = high.clamp(min=0) / spec.qmax
    elif spec.range == "signed":
        # Equal magnitudes of both signs take the positive scale.
        step = torch.where(-low >= high, low, high) / spec.qmin
    else:
        largest = torch.maximum(-low, high)
        codes = spec.bits - 1
        step = largest / {"narrow": 2.0**codes - 1, "half": 2.0**codes - 0.5, "full": 2.0**codes}[spec.range]
    return round_scale(torch.where(step == 0, 1.0, step), spec.scale), None


def one_sided(low: Tensor, high: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """A range of magnitude `largest` on the side of the larger of `low` and `high`, where a signed scale points."""
    negative = -low >= high
    return torch.where(negative, -largest, 0), torch.where(negative, 0, largest)


def error_grid(spec: QuantSpec) -> tuple[float, ...]:
    """The factors by which the mse observer tries to scale a range."""
    return POW2_GRID if is_pow2(spec.scale) else RANGE_GRID


def _asymmetric(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    steps = spec.qmax - spec.qmin
    # The width of a range of huge values of both signs overflows; its parts do not.
    width = high - low
    step = torch.where(torch.isfinite(width), width / steps, high / steps - low / steps)
    scale = round_scale(torch.where(step == 0, 1.0, step), spec.scale)
    zero = spec.qmin - low / scale.to(low.dtype)
    if spec.zero == "int":
        zero = zero.round()
    return scale, zero.clamp(spec.qmin, spec.qmax).to(spec.zero_dtype)


def _reach(spec: QuantSpec, dtype: torch.dtype) -> float:
    # The code farthest from 0 stands for at most 2^b / (2^b - 1) of the range, or 8 times it where scales are powers of
    # two; 1/128 is left for the rounding of scale and zero-point.
    share = 0.125 if is_pow2(spec.scale) else 1 - 2.0**-spec.bits
    return torch.finfo(dtype).max * share * (1 - 2.0**-7)


def _extremes(x: Tensor, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    view = split(x, shape)
    if not (inner := inner_axes(x.shape, shape)):
        return x, x
    # Two reductions: aminmax along an axis is ten times slower than both.
    return view.amin(inner, keepdim=True).reshape(shape), view.amax(inner, keepdim=True).reshape(shape)


def _percentiles(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    assert isinstance(spec.observer, Percentile)
    percent = spec.observer.percent
    values = rows(x, low.shape)
    if not spec.symmetric:
        return -_percentile(-values, percent).reshape(low.shape), _percentile(values, percent).reshape(low.shape)
    if not spec.signed:
        return torch.zeros_like(low), _percentile(values.clamp(min=0), percent).reshape(low.shape)
    return one_sided(low, high, _percentile(values.abs(), percent).reshape(low.shape))


def _percentile(values: Tensor, percent: float) -> Tensor:
    """The `percent`-th percentile of each row of `values` [rows, n], linear between the two nearest ranks."""
    count = values.shape[1]
    place = percent / 100 * (count - 1)
    rank = min(int(place), count - 1)
    # Only entries of this rank and above matter: few, for the percentages in use.
    top = values.topk(count - rank, dim=1).values
    lower = top[:, -1]
    upper = top[:, -2] if count - rank > 1 else lower
    return lower + (upper - lower) * (place - rank)


def _least_error_range(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, norm: float) -> tuple[Tensor, Tensor]:
    best = torch.ones_like(low)
    for here, there in tiles(x.shape, low.shape, whole_blocks=True):
        best[there] = _best_factor(x[here].to(low.dtype), low[there], high[there], spec, x.dtype, norm)
    return low * best, high * best


def _best_factor(x: Tensor, low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype, norm: float) -> Tensor:
    view, inner = split(x, low.shape), inner_axes(x.shape, low.shape)
    best = torch.ones_like(low)
    least = torch.full_like(low, math.inf)
    for factor in error_grid(spec):
        scale, zero = qparams_from_range(low * factor, high * factor, spec, dtype)
        step = spread(scale.to(x.dtype), x.shape)
        offset = None if zero is None else spread(zero.to(x.dtype), x.shape)
        error = float_codes(view, step, offset, spec)
        if offset is not None:
            error.sub_(offset)
        error.mul_(step).sub_(view)
        error = error.square_() if norm == 2 else error.abs_().pow_(norm)
        total = error.sum(inner).reshape(low.shape) if inner else error
        better = total < least
        least = torch.where(better, total, least)
        best = torch.where(better, factor, best)
    return best
