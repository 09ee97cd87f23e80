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
from qcompile.numerics.fit import Fit, work_dtype
from qcompile.numerics.granularity import PerChannel, PerTensor
from qcompile.numerics.histogram import FloatHistogram
from qcompile.numerics.parameters import QParams
from qcompile.numerics.params import check_finite, one_sided
from qcompile.numerics.search import search
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

    def qparams(self) -> QParams:
        """The parameters, of the shapes that `spec.parameters` gives for what it saw.

        Raises SpecError where nothing was seen.
        """
        if self._shape is None:
            raise SpecError(f"{self.spec}: the observer has seen no values; run calibration batches through it first")
        low, high = self._low, self._high
        if isinstance(self.spec.observer, Percentile):
            low, high = self._percentiles(self.spec.observer.percent)
        # A scale of any rank fits one that is a row of channels, as the histogram has them.
        channels = tuple(low.shape) if isinstance(self.spec.granularity, PerChannel) else (1,)
        fit = Fit.start(low, high, self.spec, self._dtype, (), tuple(1 for _ in channels))
        if isinstance(self.spec.observer, LeastError):
            fit = search(fit, self._error, self.spec.observer)
        scale, zero, outer = fit.stored((), channels)
        one = (1,) * len(self._shape)
        zero = None if zero is None else zero.reshape(self._shape)
        return QParams(scale.reshape(self._shape), zero, tuple(t.reshape(one) for t in outer))

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
        if not self.spec.has_negatives:
            return torch.zeros_like(low), top.clamp(min=0)
        largest = torch.maximum(-low, high)
        magnitude = between(histogram.magnitude_at_rank(rank, largest), histogram.magnitude_at_rank(after, largest))
        return one_sided(low, high, magnitude)

    def _error(self, fit: Fit) -> Tensor:
        assert self._histogram is not None
        assert isinstance(self.spec.observer, LeastError)
        return self._histogram.error(fit.steps(), fit.zero, self.spec, self.spec.observer.norm, self._low, self._high)
