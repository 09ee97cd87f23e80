"""A mergeable histogram per channel, with bins that follow the floating-point format."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.numerics.element import Codebook, FloatElement, IntElement
from qcompile.numerics.spec import QuantSpec

LOWEST_EXPONENT = -32
OCTAVES = 64
SAMPLES = 4


class FloatHistogram:
    """Counts of float32 values, one row of bins per channel.

    Each power of two from 2^-32 to 2^32 is cut into 2^`mantissa_bits` equal bins, on both sides of 0: a bin is
    2^-mantissa_bits of its value wide at most. Smaller magnitudes count as the first bin, larger ones as the last.
    Rows hold bins by ascending value. Memory: 16 bytes * 64 * 2^mantissa_bits per channel.
    """

    def __init__(self, channels: int, mantissa_bits: int, device: torch.device) -> None:
        self._mantissa_bits = mantissa_bits
        self._side = OCTAVES << mantissa_bits
        self.counts = torch.zeros(channels, 2 * self._side, dtype=torch.int64, device=device)

    def add(self, values: Tensor) -> None:
        """Count `values` [channels, n], finite."""
        # In slices, so that the eight-byte places of a large batch do not exist at once.
        for part in torch.split(values, max(1, (1 << 20) // values.shape[0]), dim=1):
            places = self._places(part.to(torch.float32).contiguous()).reshape(-1)
            self.counts.view(-1).index_add_(0, places, torch.ones_like(places))

    def merge(self, other: FloatHistogram) -> None:
        """Add the counts of `other`, which has the same bins."""
        self.counts += other.counts.to(self.counts.device)

    def edges(self) -> Tensor:
        """The bin boundaries, ascending, float64 `[bins + 1]`; the two bins next to 0 reach it."""
        keys = torch.arange(1, self._side + 1, dtype=torch.float64, device=self.counts.device)
        per_octave = 1 << self._mantissa_bits
        octave = keys.div(per_octave, rounding_mode="floor") + LOWEST_EXPONENT
        positive = (1 + keys % per_octave / per_octave) * torch.exp2(octave)
        return torch.cat([-positive.flip(0), torch.zeros_like(positive[:1]), positive])

    def at_rank(self, rank: int, low: Tensor, high: Tensor) -> Tensor:
        """An estimate, float64 [channels], of the entry with `rank` others below it, where entries are in [low, high].

        It lies in the bin of that entry, so that it is off by 2^-mantissa_bits of its value at most. It is `low` or
        `high` itself for the first and last rank, and for entries beyond the outermost bins.
        """
        return low.to(torch.float64) if rank == 0 else _at_rank(self.counts, self.edges(), rank, low, high)

    def magnitude_at_rank(self, rank: int, largest: Tensor) -> Tensor:
        """As `at_rank`, for magnitudes, the largest of which is `largest` [channels]."""
        counts = self.counts[:, self._side :] + self.counts[:, : self._side].flip(1)
        return _at_rank(counts, self.edges()[self._side :], rank, torch.zeros_like(largest), largest)

    def error(
        self, scale: Tensor, zero: Tensor | None, spec: QuantSpec, norm: float, low: Tensor, high: Tensor
    ) -> Tensor:
        """The sum of |x - dequantized| ** norm in each row, float64 [channels], for scales and zero-points [channels].

        The integral of the error over each bin with entries spread evenly over it, in closed form for integers, by the
        midpoint rule on `SAMPLES` points for other elements.
        """
        errors = [torch.zeros(0, dtype=torch.float64, device=self.counts.device)]
        step = max(1, (1 << 20) // self.counts.shape[1])
        for part in (slice(start, start + step) for start in range(0, self.counts.shape[0], step)):
            offset = None if zero is None else zero[part].to(torch.float64).unsqueeze(1)
            step_size = scale[part].to(torch.float64).unsqueeze(1)
            bounds = (low[part].to(torch.float64).unsqueeze(1), high[part].to(torch.float64).unsqueeze(1))
            edges = self.edges().expand(bounds[0].shape[0], -1).clone()
            # The outermost bins hold everything beyond them; no bin reaches further than the data.
            edges[:, 0], edges[:, -1] = -torch.inf, torch.inf
            edges = edges.clamp(*bounds)
            if isinstance(spec.element, IntElement):
                mean = _mean_of_levels(_Levels(step_size, offset, spec, norm), edges)
            else:
                mean = _mean_sampled(edges, step_size, spec.element, norm)
            errors.append((mean * self.counts[part]).sum(1))
        return torch.cat(errors)

    def _places(self, values: Tensor) -> Tensor:
        pattern = values.view(torch.int32)
        # The exponent and leading mantissa bits, as one number, grow with the magnitude.
        key = (pattern & 0x7FFFFFFF) >> (23 - self._mantissa_bits)
        key = (key - ((LOWEST_EXPONENT + 127) << self._mantissa_bits)).clamp_(0, self._side - 1)
        place = torch.where(pattern < 0, self._side - 1 - key, self._side + key)
        return place + torch.arange(values.shape[0], device=values.device).unsqueeze(1) * (2 * self._side)


def _at_rank(counts: Tensor, edges: Tensor, rank: int, low: Tensor, high: Tensor) -> Tensor:
    below = counts.cumsum(1)
    ranks = torch.full_like(below[:, :1], rank)
    found = torch.searchsorted(below, ranks, right=True)
    inside = counts.gather(1, found)
    place = (ranks - below.gather(1, found) + inside + 0.5) / inside
    value = edges[found] + place.to(torch.float64) * (edges[found + 1] - edges[found])
    low, high = low.to(torch.float64).unsqueeze(1), high.to(torch.float64).unsqueeze(1)
    # The extremes are known exactly, and are all that is known of what lies beyond the outermost edges.
    value = torch.where(
        (ranks == below[:, -1:] - 1) | ((found == counts.shape[1] - 1) & (high > edges[-1])), high, value
    )
    value = torch.where((found == 0) & (low < edges[0]), low, value)
    return value.clamp(low, high).squeeze(1)


def _mean_of_levels(levels: _Levels, edges: Tensor) -> Tensor:
    width = edges.diff(dim=1)
    return torch.where(width > 0, levels.integral(edges).diff(dim=1) / width, levels.error(edges[:, 1:]))


def _mean_sampled(edges: Tensor, step: Tensor, element: FloatElement | Codebook, norm: float) -> Tensor:
    low, width = edges[:, :-1], edges.diff(dim=1)
    total = torch.zeros_like(low)
    for index in range(SAMPLES):
        x = low + width * ((index + 0.5) / SAMPLES)
        total += (element.round(x / step) * step - x).abs() ** norm
    return total / SAMPLES


class _Levels:
    """What the codes of each row stand for, (q - zero) * scale: the error of rounding to it, and its integral."""

    def __init__(self, scale: Tensor, zero: Tensor | None, spec: QuantSpec, norm: float) -> None:
        self._norm = norm
        self._step = scale.abs()
        self._zero = torch.zeros_like(scale) if zero is None else zero
        # A negative scale (symmetric only) mirrors the codes.
        self._lowest = torch.where(scale < 0, -spec.qmax, spec.qmin)
        self._highest = torch.where(scale < 0, -spec.qmin, spec.qmax)

    def _nearest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        codes = x / self._step + self._zero
        nearest = codes.round().clamp(self._lowest, self._highest)
        return nearest, (codes - nearest) * self._step

    def error(self, x: Tensor) -> Tensor:
        """|x - rounded| ** norm."""
        return self._nearest(x)[1].abs() ** self._norm

    def integral(self, x: Tensor) -> Tensor:
        """An antiderivative of `error`: one step's worth per code passed, and the part of the step `x` is in."""
        nearest, rest = self._nearest(x)
        power = self._norm + 1
        return nearest * 2 * (self._step / 2) ** power / power + rest.sign() * rest.abs() ** power / power
