"""Half-quadratic optimisation of zero-points or scales, one weight at a time and without data.

The error of rounding is split into a sparse part, found by the shrinkage of an l_p norm (p < 1), and the rest, to which
the parameter is fitted in closed form; the two alternate under a penalty that grows. From HQQ (Badri and Shaji 2023),
equations 4 to 8, for the zero-point; the scale of a symmetric format is fitted by least squares in the same loop.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.numerics.blocks import inner_axes, split, spread, tiles
from qcompile.numerics.fit import Fit
from qcompile.numerics.quantize import int_codes
from qcompile.numerics.scaling import to_units

STEPS = 20


@dataclass(frozen=True)
class _Schedule:
    """The l_p norm, the penalty at the start, and what it is multiplied by after every step."""

    p: float
    beta: float
    kappa: float


ZERO_POINT = _Schedule(p=0.7, beta=1.0, kappa=1.01)
SCALE = _Schedule(p=0.7, beta=1.0, kappa=1.01)
"""For errors in steps, so that it does not depend on how large the weights are. A penalty of 1e5, as Brevitas starts
from, shrinks no error by a thousandth of a step, and then no scale moves.
"""


def half_quadratic(x: Tensor, fit: Fit) -> Fit:
    """`fit` with better zero-points (asym) or units (sym); a group stops at its first step that is
    not better than the one before, in mean |error|."""
    units = fit.units.clone()
    zero = None if fit.zero is None else fit.zero.clone()
    for here, there in tiles(x.shape, fit.units.shape, whole_blocks=True):
        best = _of_tile(x[here], fit.part(there))
        units[there] = best.units
        if zero is not None and best.zero is not None:
            zero[there] = best.zero
    return fit.at(units, zero)


def _of_tile(x: Tensor, fit: Fit) -> Fit:
    schedule = SCALE if fit.zero is None else ZERO_POINT
    shape, best, current = fit.units.shape, fit, fit
    view, inner = split(x, shape), inner_axes(x.shape, shape)
    least, beta = torch.full_like(fit.low, torch.inf), schedule.beta
    improving = torch.ones_like(fit.low, dtype=torch.bool)

    def total(values: Tensor) -> Tensor:
        return values.sum(inner).reshape(shape) if inner else values

    for _ in range(STEPS):
        scale = spread(current.steps().to(x.dtype), x.shape)
        zero = None if current.zero is None else spread(current.zero, x.shape)
        codes = int_codes(view, scale, zero, fit.spec)
        rest = view - (codes if zero is None else codes - zero) * scale
        error = total(rest.abs())
        improving &= error < least
        least = torch.where(improving, error, least)
        kept = None if best.zero is None or current.zero is None else torch.where(improving, current.zero, best.zero)
        best = best.at(torch.where(improving, current.units, best.units), kept)
        if not bool(improving.any()):
            break
        unit = scale.abs() if current.zero is None else 1.0
        smooth = view - _shrink(rest / unit, beta, schedule.p) * unit
        current = _refit(current, codes, smooth, scale, total)
        beta *= schedule.kappa
    return best


def _refit(fit: Fit, codes: Tensor, target: Tensor, scale: Tensor, total: object) -> Fit:
    """The zero-point, or the unit, that fits `codes` to `target` best in least squares."""
    assert callable(total)
    if fit.zero is None:
        energy = total(codes.square())
        raw = torch.where(energy > 0, total(codes * target) / energy.clamp(min=1), fit.units.to(codes.dtype))
        # A step of the other sign, or none, would be no scale of these codes.
        raw = torch.where(raw * fit.units > 0, raw, fit.units.to(raw.dtype))
        return fit.at(to_units(raw, raw.abs(), raw, fit.spec, fit.outer), None)
    count = codes.numel() // fit.units.numel()
    zero = total(codes - target / scale) / count
    if fit.spec.zero == "int":
        zero = zero.round().clamp(fit.spec.qmin, fit.spec.qmax)
    return fit.at(fit.units, zero)


def _shrink(error: Tensor, beta: float, p: float) -> Tensor:
    """sign(e) * max(0, |e| - p |e|^(p - 1) / beta); 0 stays 0."""
    size = error.abs()
    shrunk = (size - (p / beta) * size.clamp(min=1e-30) ** (p - 1)).clamp(min=0)
    return torch.copysign(shrunk, error)
