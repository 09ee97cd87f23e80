"""Streaming observers: parameters of a static activation, from calibration batches seen one at a time.

`absmax` and `minmax` keep the extremes and are exact. `percentile` and `mse` also keep a histogram of fixed size whose
bins are taken from the floating-point format: sign, exponent and the leading bits of the mantissa. So bins are known
before the data, counts are integers, and the result depends neither on the order of batches nor on how they were dealt
out before `merge`. The bin that holds a percentile's rank is found exactly; within it values are taken to be spread
evenly, so that the percentile is off by 2^-7 of itself at most (2^-5 where each channel has its own scale), the width
of a bin, and its rank by at most the count of that bin.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.blocks import rows
from qcompile.numerics.criterion import LeastError, Percentile
from qcompile.numerics.granularity import PerChannel, PerTensor
from qcompile.numerics.histogram import FloatHistogram
from qcompile.numerics.params import check_finite, error_grid, one_sided, qparams_from_range
from qcompile.numerics.quantize import work_dtype
from qcompile.numerics.spec import QuantSpec

TENSOR_MANTISSA_BITS = 7
CHANNEL_MANTISSA_BITS = 5


class Observer:
    """Gathers what `spec` needs from any number of tensors; `qparams` then gives one scale, or one per channel.

    Raises SpecError where `spec` has neither `tensor` nor `channel` granularity.
    """

    def __init__(self, spec: QuantSpec) -> None:
        if not isinstance(spec.granularity, PerTensor | PerChannel):
            raise SpecError(
                f"{spec}: {spec.granularity} scales cannot be observed ahead; use tensor, channel or dynamic"
            )
        self.spec = spec
        self._shape: tuple[int, ...] | None = None
        self._dtype = torch.float32
        self._count = 0
        self._low = self._high = torch.empty(0)
        self._histogram: FloatHistogram | None = None

    def observe(self, x: Tensor) -> None:
        """Take in `x` (any float dtype); sizes may differ between calls, but not the rank or the channels.

        Raises SpecError where they do, or where `x` holds nan or infinity; nothing of such an `x` is kept.
        """
        work = work_dtype(x)
        shape = self.spec.scale_shape(x.shape)
        self._check_shape(shape)
        if x.numel() == 0:
            return
        values = rows(x.detach(), shape)
        low, high = values.amin(1), values.amax(1)
        check_finite(low, high, x, self.spec)
        self._extend(low.to(work), high.to(work))
        self._shape, self._dtype = shape, x.dtype
        self._count += values.shape[1]
        if isinstance(self.spec.observer, Percentile | LeastError):
            if self._histogram is None:
                self._histogram = self._new_histogram(values)
            self._histogram.add(values)

    def merge(self, other: Observer) -> None:
        """Take in all that `other`, of an equal spec, has seen."""
        if other.spec != self.spec:
            raise SpecError(f"cannot merge an observer of {other.spec} into one of {self.spec}; specs must be equal")
        if other._shape is None:
            return
        self._check_shape(other._shape)
        self._extend(other._low, other._high)
        self._shape, self._dtype = other._shape, other._dtype
        self._count += other._count
        if other._histogram is not None:
            if self._histogram is None:
                self._histogram = self._new_histogram(other._low.unsqueeze(1))
            self._histogram.merge(other._histogram)

    def qparams(self) -> tuple[Tensor, Tensor | None]:
        """Scale and zero-point (None where `spec` is symmetric), of the shape `spec.scale_shape` gave for what it saw.

        Raises SpecError where nothing was seen.
        """
        if self._shape is None:
            raise SpecError(f"{self.spec}: the observer has seen no values; run calibration batches through it first")
        low, high = self._low, self._high
        if isinstance(self.spec.observer, Percentile):
            low, high = self._percentiles(self.spec.observer.percent)
        elif isinstance(self.spec.observer, LeastError):
            factor = self._least_error_factor(self.spec.observer.norm)
            low, high = low * factor, high * factor
        return qparams_from_range(low.reshape(self._shape), high.reshape(self._shape), self.spec, self._dtype)

    def _check_shape(self, shape: tuple[int, ...]) -> None:
        if self._shape not in (None, shape):
            seen = list(self._shape or ())
            raise SpecError(
                f"{self.spec}: scales of shape {seen} so far, {list(shape)} now; use one observer per tensor"
            )

    def _extend(self, low: Tensor, high: Tensor) -> None:
        if self._shape is None:
            self._low, self._high = low, high
        else:
            self._low, self._high = torch.minimum(self._low, low), torch.maximum(self._high, high)

    def _new_histogram(self, values: Tensor) -> FloatHistogram:
        per_tensor = isinstance(self.spec.granularity, PerTensor)
        bits = TENSOR_MANTISSA_BITS if per_tensor else CHANNEL_MANTISSA_BITS
        return FloatHistogram(values.shape[0], bits, values.device)

    def _percentiles(self, percent: float) -> tuple[Tensor, Tensor]:
        assert self._histogram is not None
        histogram, low, high = self._histogram, self._low, self._high
        place = percent / 100 * (self._count - 1)
        rank = min(int(place), self._count - 1)
        after = min(rank + 1, self._count - 1)

        def between(lower: Tensor, upper: Tensor) -> Tensor:
            return (lower + (upper - lower) * (place - rank)).to(low.dtype)

        top = between(histogram.at_rank(rank, low, high), histogram.at_rank(after, low, high))
        if not self.spec.symmetric:
            last = self._count - 1
            bottom = between(histogram.at_rank(last - rank, low, high), histogram.at_rank(last - after, low, high))
            return bottom, top
        if not self.spec.signed:
            return torch.zeros_like(low), top.clamp(min=0)
        largest = torch.maximum(-low, high)
        magnitude = between(histogram.magnitude_at_rank(rank, largest), histogram.magnitude_at_rank(after, largest))
        return one_sided(low, high, magnitude)

    def _least_error_factor(self, norm: float) -> Tensor:
        assert self._histogram is not None
        low, high = self._low, self._high
        best = torch.ones_like(low)
        least = torch.full(low.shape, torch.inf, dtype=torch.float64, device=low.device)
        for factor in error_grid(self.spec):
            scale, zero = qparams_from_range(low * factor, high * factor, self.spec, self._dtype)
            error = self._histogram.error(scale, zero, self.spec, norm, low, high)
            better = error < least
            least = torch.where(better, error, least)
            best = torch.where(better, factor, best)
        return best
