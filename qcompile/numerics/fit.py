"""Parameters of groups while they are being chosen: what range they cover, in units that the scale type can hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.element import IntElement
from qcompile.numerics.parameters import QParams
from qcompile.numerics.scale_type import (
    DoubleScale,
    E4M3Scale,
    E8M0Scale,
    FloatScale,
    MicroScale,
    Pow2Scale,
    scale_dtype,
)
from qcompile.numerics.scaling import encode_double, global_scale, micro_parameters, to_stored, to_units, unit_steps

if TYPE_CHECKING:
    from qcompile.numerics.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class Fit:
    """Units (float32) and zero-points (work dtype; None for `sym`) for groups whose entries lie in [low, high].

    `low`, `high`, `units` and `zero` have the scale's shape; `outer` holds the global scale where the type has one.
    """

    spec: QuantSpec
    dtype: torch.dtype  # of the data
    low: Tensor
    high: Tensor
    units: Tensor
    zero: Tensor | None
    outer: tuple[Tensor, ...]

    @classmethod
    def start(
        cls,
        low: Tensor,
        high: Tensor,
        spec: QuantSpec,
        dtype: torch.dtype,
        outer: tuple[Tensor, ...],
        whole: tuple[int, ...],
    ) -> Fit:
        """The fit that covers [low, high]. `whole` is the shape of what a tensor has one of.

        Ranges within 1/128 of the largest finite value of `dtype`, that of the data, are pulled in, so that no code
        dequantizes to infinity.
        """
        low, high = _within_reach(low, high, spec, dtype)
        raw, largest = _asked(low, high, spec)
        if isinstance(spec.scale, E4M3Scale) and spec.scale.shared and not outer:
            outer = (global_scale(raw, largest, spec, whole),)
        fit = cls(spec, dtype, low, high, to_units(raw, largest, high, spec, outer), None, outer)
        return fit if spec.symmetric else fit.at(fit.units, fit.zero_for(low))

    def scaled(self, factor: float | Tensor) -> Fit:
        """The fit to a range `factor` times as wide; floats and powers of two only."""
        low, high = _within_reach(self.low * factor, self.high * factor, self.spec, self.dtype)
        raw, largest = _asked(low, high, self.spec)
        moved = replace(self, units=to_units(raw, largest, high, self.spec, self.outer))
        return moved if self.spec.symmetric else moved.at(moved.units, moved.zero_for(low))

    def with_units(self, units: Tensor) -> Fit:
        """The fit with other units, zero-points following them."""
        moved = replace(self, units=units)
        if self.spec.symmetric:
            return moved
        return moved.at(units, moved.zero_for(self.low * (units / self.units).to(self.low.dtype)))

    def at(self, units: Tensor, zero: Tensor | None) -> Fit:
        """The fit with these units and zero-points."""
        return replace(self, units=units, zero=zero)

    def part(self, there: Sequence[slice]) -> Fit:
        """The fit of some groups."""

        def cut(t: Tensor) -> Tensor:
            return t[tuple(s if n > 1 else slice(None) for s, n in zip(there, t.shape, strict=True))]

        zero = None if self.zero is None else cut(self.zero)
        outer = tuple(cut(t) for t in self.outer)
        return replace(self, low=cut(self.low), high=cut(self.high), units=cut(self.units), zero=zero, outer=outer)

    def steps(self) -> Tensor:
        """The float32 step of each group."""
        return unit_steps(self.units, self.spec, self.outer)

    def zero_for(self, low: Tensor) -> Tensor:
        """The zero-point, as the recipe has it but not yet stored, that maps `low` to the lowest code."""
        spec = self.spec
        zero = spec.qmin - low.clamp(max=0) / self.steps().to(low.dtype)
        if spec.zero == "int":
            zero = zero.round()
        zero = zero.clamp(spec.qmin, spec.qmax)
        return zero.to(scale_dtype(spec.scale)).to(low.dtype) if _zero_as_scale(spec) else zero

    def stored(self, via: tuple[Tensor, ...], shape: Sequence[int]) -> QParams:
        """The parameters as they are stored, for a tensor of `shape`."""
        spec = self.spec
        if isinstance(spec.scale, MicroScale):
            largest = torch.maximum(-self.low, self.high).to(torch.float32)
            blocks = next(p.shape for p in spec.parameters(shape) if p.name == "exponent")
            scale, exponent = micro_parameters(largest, spec, blocks)
            return QParams(scale, None, (exponent,))
        scale, outer = to_stored(self.units, spec, self.outer)
        zero = self.zero
        if zero is not None and isinstance(spec.zero, DoubleScale):
            zero, zero_outer = encode_double(zero.to(torch.float32), spec.zero, positive=False)
            outer = (*outer, *zero_outer)
        elif zero is not None:
            zero = zero.to(spec.storage if spec.zero == "int" else self._float_zero())
        return QParams(scale, zero, (*outer, *via))

    def _float_zero(self) -> torch.dtype:
        return scale_dtype(self.spec.scale) if _zero_as_scale(self.spec) else torch.float32


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype that parameters and codes of `x` are computed in; SpecError where `x` is not of a float dtype."""
    if not x.is_floating_point():
        raise SpecError(f"cannot quantize a tensor of {x.dtype}; convert it to a float dtype first")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _zero_as_scale(spec: QuantSpec) -> bool:
    """Whether a float zero-point is of the scale's dtype."""
    return spec.zero == "float" and isinstance(spec.scale, FloatScale)


def _asked(low: Tensor, high: Tensor, spec: QuantSpec) -> tuple[Tensor, Tensor]:
    """The steps that ranges ask for, signed, 0 where a group is all zeros; and the largest magnitudes."""
    largest = torch.maximum(-low, high)
    if isinstance(spec.scale, E8M0Scale | MicroScale):
        return largest, largest
    if not isinstance(spec.element, IntElement):
        return largest / spec.element.largest, largest
    if not spec.symmetric:
        low, high = low.clamp(max=0), high.clamp(min=0)
        # The width of a range of huge values of both signs overflows; its parts do not.
        width, count = high - low, spec.qmax - spec.qmin
        return torch.where(torch.isfinite(width), width / count, high / count - low / count), largest
    if not spec.has_negatives:
        return high.clamp(min=0) / spec.qmax, largest
    if spec.range == "signed":
        # Equal magnitudes of both signs take the positive scale.
        return torch.where(-low >= high, low, high) / spec.qmin, largest
    codes = 2.0 ** (spec.bits - 1)
    return largest / {"narrow": codes - 1, "half": codes - 0.5, "full": codes}[spec.range], largest


def _within_reach(low: Tensor, high: Tensor, spec: QuantSpec, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The range without the part that would dequantize to infinity. Shared exponents follow their rule as it is, and a
    global scale stores none that is larger than the range asks for.
    """
    if isinstance(spec.scale, E8M0Scale | MicroScale) or spec.scale == E4M3Scale():
        return low, high
    # The code farthest from 0 stands for at most 2^b / (2^b - 1) of the range, or 8 times it where scales are powers of
    # two; 1/128 is left for the rounding of scale and zero-point.
    if isinstance(spec.scale, Pow2Scale):
        share = 0.125
    else:
        share = 1 - 2.0**-spec.bits if isinstance(spec.element, IntElement) else 1.0
    # Scales that are stored with three bits of mantissa may round a sixteenth up.
    room = 2.0**-4 if isinstance(spec.scale, E4M3Scale) else 2.0**-7
    reach = torch.finfo(dtype).max * share * (1 - room)
    return low.clamp(-reach, reach), high.clamp(-reach, reach)
