"""`QuantSpec`: everything that decides how a tensor becomes codes, as one frozen value that prints and parses back."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import fields as spec_fields
from qcompile.numerics.criterion import AbsMax, Criterion, LeastError, MinMax, Percentile
from qcompile.numerics.element import Element
from qcompile.numerics.granularity import Granularity, PerBlock, PerGroup, PerToken
from qcompile.numerics.scale_type import SCALE_TYPES, ScaleType, scale_bits, scale_dtype

if TYPE_CHECKING:
    from qcompile.numerics.qtensor import QTensor

Range: TypeAlias = Literal["signed", "half", "full", "narrow"]
Zero: TypeAlias = Literal["none", "int", "float"]
When: TypeAlias = Literal["static", "dynamic"]


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized. Make one with `QuantSpec.parse("int4 sym group=128")` or `QuantSpec.from_fields`.

    Fields, with the words of a spec string and what is taken when none is given:

    - `element`: `int1`…`int8`, `uint1`…`uint8`, `ternary` {-1, 0, 1}. Always the first word.
    - `symmetric`: `sym` (no zero-point; default) or `asym`.
    - `range`, for `sym`, b bits: `narrow` scale = absmax / (2^(b-1) - 1); `half` absmax / (2^(b-1) - 1/2); `full`
      absmax / 2^(b-1); `signed` the entry of largest magnitude maps to -2^(b-1), so the scale carries a sign.
      Default `signed` for weights (`when` unset), `half` for activations, `narrow` for ternary, `full` for unsigned
      elements (scale = max / (2^b - 1); negative entries clamp to 0).
    - `granularity`: `tensor`, `channel [axis=]`, `token`, `group=N [axis=]`, `block=RxC`. Default `channel` for
      weights, `token` where dynamic, `tensor` where static. Default axis: for `group` the last; for `channel` the
      first of a weight and the last of an activation; `axis=0,1` keeps two.
    - `scale`: `scale=f32` (default), `f16`, `bf16`, `pow2` (rounded up), `pow2(floor)`, `pow2(round)`, `pow2(midmax)`.
    - `zero`: `zero=none` for `sym`; `zero=int` (in the code range; default) or `zero=float` for `asym`.
    - `when`: `static` or `dynamic` for activations, unset for weights.
    - `observer`: `absmax` (default of `sym`), `minmax` (default of `asym`), `percentile=99.999`, `mse`, `mse=2.4`.

    The constructor takes every field resolved and refuses impossible combinations with SpecError.
    """

    element: Element
    symmetric: bool
    range: Range
    granularity: Granularity
    scale: ScaleType
    zero: Zero
    when: When | None
    observer: Criterion

    def __post_init__(self) -> None:
        if (reason := _impossible(self)) is not None:
            raise SpecError(f"{self}: {reason}")

    @classmethod
    def parse(cls, text: str) -> QuantSpec:
        """Read a spec string; SpecError names an unknown word and the nearest known one."""
        return cls.from_fields(spec_fields.split_words(text))

    @classmethod
    def from_fields(cls, fields: Mapping[str, object]) -> QuantSpec:
        """Build from plain values by field name, as a recipe holds them; what is absent or None takes its default.

        Names: element, bits, symmetry, range, granularity, group, block, axis, scale, zero, when, observer, percentile,
        mse. `bits` changes the width of `element`.
        """
        return spec_fields.build(fields)

    def fields(self) -> dict[str, str | int]:
        """Plain values that `from_fields` reads back; defaults are left out, but for symmetry and granularity."""
        return spec_fields.describe(self)

    def with_fields(self, changes: Mapping[str, object]) -> QuantSpec:
        """This spec with some fields changed, e.g. `{"group": 64}` or `{"bits": 3}`; None resets one to its default.

        A new granularity replaces the old one and its axis; a new symmetry resets range, zero and observer.
        """
        return spec_fields.build(spec_fields.merge(self.fields(), changes))

    def __str__(self) -> str:
        return spec_fields.join_words(self.fields())

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return self.element.bits

    @property
    def signed(self) -> bool:
        """Whether codes can be negative."""
        return self.element.signed

    @property
    def qmin(self) -> int:
        """The lowest code in use."""
        return self.element.lowest + (self.range == "narrow" and not self.element.ternary)

    @property
    def qmax(self) -> int:
        """The highest code in use."""
        return self.element.highest

    @property
    def storage(self) -> torch.dtype:
        """The dtype of a codes tensor: torch.int8 or torch.uint8, one code each."""
        return self.element.storage

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of a scale tensor."""
        return scale_dtype(self.scale)

    @property
    def zero_dtype(self) -> torch.dtype:
        """The dtype of a zero-point tensor: that of codes for `zero=int`, of scales for `zero=float`."""
        return self.scale_dtype if self.zero == "float" else self.storage

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The scale's shape for a tensor of `shape` (sizes may be symbolic); SpecError where groups do not divide."""
        return self.granularity.scale_shape(shape)

    def bits_per_element(self, shape: Sequence[int]) -> float:
        """Bits of codes, scales and zero-points together, over the elements of a tensor of `shape`."""
        if (elements := math.prod(shape)) == 0:
            return float(self.bits)
        zero_bits = {"none": 0, "int": self.bits, "float": scale_bits(self.scale)}[self.zero]
        overhead = math.prod(self.scale_shape(shape)) * (scale_bits(self.scale) + zero_bits)
        return self.bits + overhead / elements

    def quantize(self, tensor: Tensor) -> QTensor:
        """Choose parameters for `tensor` (any float dtype) and round it: codes, scale, zero-point and this spec."""
        from qcompile.numerics.qtensor import quantize_tensor  # that module needs this one

        return quantize_tensor(tensor, self)


def _impossible(spec: QuantSpec) -> str | None:
    """Why `spec` cannot be, and the way out; None where it can."""
    return _range_reason(spec) or _zero_reason(spec) or _scale_reason(spec) or _observer_reason(spec)


def _range_reason(spec: QuantSpec) -> str | None:
    bits = spec.bits
    if spec.range not in ("signed", "half", "full", "narrow"):
        return f"unknown range {spec.range!r}; use signed, half, full or narrow"
    if spec.element.ternary:
        if not spec.symmetric:
            return "ternary has no zero-point; use sym, or int2 asym"
        return (
            None if spec.range == "narrow" else f"ternary is the narrow two-bit range; drop {spec.range}, or use int2"
        )
    if not spec.symmetric:
        return None if spec.range == "full" else f"asym always uses every code; drop {spec.range}, or use sym"
    if not spec.signed:
        way_out = f"drop {spec.range}, or use int{bits}"
        return None if spec.range == "full" else f"range {spec.range} needs negative codes; {way_out}"
    if bits == 1 and spec.range in ("narrow", "half"):
        return f"range {spec.range} rounds every value to 0 with one bit; use signed, or asym"
    return None


def _zero_reason(spec: QuantSpec) -> str | None:
    if spec.zero not in ("none", "int", "float"):
        return f"unknown zero {spec.zero!r}; use zero=int, zero=float or zero=none"
    if spec.symmetric and spec.zero != "none":
        return f"sym has no zero-point; drop zero={spec.zero}, or use asym"
    if not spec.symmetric and spec.zero == "none":
        return "asym needs a zero-point; drop zero=none, or use sym"
    return None


def _scale_reason(spec: QuantSpec) -> str | None:
    if spec.scale not in SCALE_TYPES:
        return f"unknown scale {spec.scale!r}; use scale={', scale='.join(SCALE_TYPES)}"
    if spec.when not in (None, "static", "dynamic"):
        return f"unknown when {spec.when!r}; use static, dynamic, or neither for a weight"
    if spec.when == "static" and isinstance(spec.granularity, PerToken | PerGroup | PerBlock):
        return (
            f"{spec.granularity} has one scale for every token, unknown before run time; use dynamic, tensor or channel"
        )
    return None


def _observer_reason(spec: QuantSpec) -> str | None:
    if not isinstance(spec.observer, AbsMax | MinMax | Percentile | LeastError):
        return f"{spec.observer!r} is not an observer; use absmax, minmax, percentile or mse"
    if spec.symmetric and isinstance(spec.observer, MinMax):
        return "minmax needs a zero-point to move; use absmax, or asym"
    if not spec.symmetric and isinstance(spec.observer, AbsMax):
        return "absmax would waste the codes of the shorter side; use minmax, or sym"
    return None
