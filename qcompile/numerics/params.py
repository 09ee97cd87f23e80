"""Scales and zero-points from data.

Everything is computed in float32 (float64 for float64 data), rounded to the scale's type, and only then used, so that
codes are chosen against the scale that will be stored.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.blocks import inner_axes, row_chunks, rows, split, tiles
from qcompile.numerics.criterion import HalfQuadratic, LeastError, Percentile
from qcompile.numerics.fit import Fit, work_dtype
from qcompile.numerics.hqo import half_quadratic
from qcompile.numerics.parameters import QParams, per_tensor
from qcompile.numerics.scale_type import DoubleScale, E4M3Scale
from qcompile.numerics.search import least_error
from qcompile.numerics.spec import QuantSpec


def choose_qparams(x: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...] = ()) -> QParams:
    """The stored parameters for `x`, of any float dtype and shape: those of `spec.parameters(x.shape)`, in that order.

    `outer`: outer parameters that are given, all of them: a global scale shared with other tensors, say. A group of
    zeros, or an empty one, gets scale 1 (the least of the type where scales are e8m0 or e4m3). Raises SpecError where a
    group does not divide, or where `x` holds nan or infinity and the format has no home for them.
    """
    outer = outer or _global_ahead(x, spec)
    chunks = list(row_chunks(x.shape, spec.scale_shape(x.shape))) if _by_rows(spec, outer) else []
    if len(chunks) < 2:
        return _choose(x, spec, outer)
    own = outer if isinstance(spec.scale, E4M3Scale) else ()
    parts = [_choose(x[rows], spec, own).stored() for rows in chunks]
    scale, *rest = (torch.cat(column) for column in zip(*(p[: len(p) - len(own)] for p in parts), strict=True))
    zero = None if spec.symmetric else rest.pop(0)
    return QParams(scale, zero, (*rest, *own))


def _by_rows(spec: QuantSpec, outer: tuple[Tensor, ...]) -> bool:
    """Whether rows of a tensor can be looked at one after the other: nothing is shared but outer parameters that are
    known.
    """
    doubled = isinstance(spec.scale, DoubleScale) or isinstance(spec.zero, DoubleScale)
    shared = isinstance(spec.scale, E4M3Scale) and spec.scale.shared and not outer
    return not doubled and not shared and spec.via is None and spec.stack is None


def _global_ahead(x: Tensor, spec: QuantSpec) -> tuple[Tensor, ...]:
    """The global scale of a whole tensor where its extremes alone decide it; () where they do not, or there is none."""
    alone = spec.symmetric and spec.stack is None and not isinstance(spec.observer, Percentile)
    if spec.scale != E4M3Scale() or not alone or x.numel() == 0 or not x.is_floating_point():
        return ()
    whole, work = per_tensor(spec, x.shape), work_dtype(x)
    low, high = (extreme(x).reshape(whole).to(work) for extreme in (torch.amin, torch.amax))
    return Fit.start(low, high, spec, x.dtype, (), whole).outer


def _choose(x: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...]) -> QParams:
    work = work_dtype(x)
    shape = spec.scale_shape(x.shape)
    if spec.when == "no_scale":
        if not spec.keeps_nan:
            check_finite(*_extremes(x, shape), x, spec)
        return QParams(torch.ones(shape, device=x.device), None)
    values, via = through(x.to(work), spec, outer)
    if x.numel() == 0:
        low = high = torch.zeros(shape, dtype=work, device=x.device)
    else:
        low, high = _extremes(values, shape)
        if not spec.keeps_nan:
            check_finite(low, high, x, spec)
    if isinstance(spec.observer, Percentile) and x.numel():
        low, high = _percentiles(values, low, high, spec)
    fit = Fit.start(low, high, spec, x.dtype, outer[:-1] if via else outer, per_tensor(spec, x.shape))
    if x.numel() == 0:
        return fit.stored(via, x.shape)
    if isinstance(spec.observer, LeastError):
        fit = _tiled_search(values, fit, spec.observer)
    elif isinstance(spec.observer, HalfQuadratic):
        fit = half_quadratic(values, fit)
    return fit.stored(via, x.shape)


def through(x: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """`x` as values of the element `spec.via`, divided by that element's scale, and the scale; `x` and () without it.

    The scale is the last of `outer` where that is given, else absmax / largest.
    """
    if spec.via is None:
        return x, ()
    scale = outer[-1] if outer else via_scale(x, spec)
    values, divisor = torch.empty_like(x), scale.to(x.dtype).expand(x.shape)
    for here, _ in tiles(x.shape, (1,) * x.dim()):
        values[here] = spec.via.round(x[here] / divisor[here])
    return values, (scale,)


def via_scale(x: Tensor, spec: QuantSpec) -> Tensor:
    """The scale of the element `spec.via` for a tensor: absmax / largest, float32, 1 for zeros."""
    assert spec.via is not None
    shape = per_tensor(spec, x.shape)
    if x.numel() == 0:
        return torch.ones(shape, device=x.device)
    low, high = _extremes(x, shape)
    check_finite(low, high, x, spec)
    scale = (torch.maximum(-low, high) / spec.via.largest).to(torch.float32)
    return torch.where(scale == 0, 1.0, scale).clamp(min=2.0**-126)


def check_finite(low: Tensor, high: Tensor, x: Tensor, spec: QuantSpec) -> None:
    """SpecError where the extremes of `x` show that it holds nan or infinity."""
    if not bool((torch.isfinite(low) & torch.isfinite(high)).all()):
        raise SpecError(
            f"{spec}: the tensor (shape {list(x.shape)}) holds nan or infinity; find its source, or clamp it"
        )


def one_sided(low: Tensor, high: Tensor, largest: Tensor) -> tuple[Tensor, Tensor]:
    """A range of magnitude `largest` on the side of the larger of `low` and `high`, where a signed scale points."""
    negative = -low >= high
    return torch.where(negative, -largest, 0), torch.where(negative, 0, largest)


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
    if not spec.has_negatives:
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


def _tiled_search(x: Tensor, fit: Fit, observer: LeastError) -> Fit:
    units = torch.empty_like(fit.units)
    zero = None if fit.zero is None else torch.empty_like(fit.zero)
    for here, there in tiles(x.shape, fit.units.shape, whole_blocks=True):
        best = least_error(x[here], fit.part(there), observer)
        units[there] = best.units
        if zero is not None and best.zero is not None:
            zero[there] = best.zero
    return fit.at(units, zero)
