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
from qcompile.numerics.criterion import Criterion
from qcompile.numerics.element import Element, FloatElement, IntElement
from qcompile.numerics.granularity import Granularity
from qcompile.numerics.parameters import Parameter, parameters, zero_type
from qcompile.numerics.possible import impossible
from qcompile.numerics.scale_type import DoubleScale, E8M0Scale, ScaleType, scale_dtype

if TYPE_CHECKING:
    from qcompile.numerics.qtensor import QTensor

Range: TypeAlias = Literal["signed", "half", "full", "narrow"]
Zero: TypeAlias = Literal["none", "int", "float"] | DoubleScale
When: TypeAlias = Literal["static", "dynamic", "no_scale"]


@dataclass(frozen=True, kw_only=True)
class QuantSpec:
    """How a tensor is quantized. Make one with `QuantSpec.parse("int4 sym group=128")` or `QuantSpec.from_fields`.

    Fields, with the words of a spec string and what is taken when none is given:

    - `element`, always the first word: `int1`…`int8`, `uint1`…`uint8`, `ternary` {-1, 0, 1}; `e4m3fn`, `e5m2`,
      `e4m3fnuz`, `e5m2fnuz`, `e2m1` or any eXmY; `nf4`, `fp4`. Or the name of a format, which sets group and scale
      too: `mxfp4(even)`, `nvfp4`, `bfp16`, `mx9` (see `qcompile.numerics.formats`).
    - `symmetric`: `sym` (no zero-point; default) or `asym`, for integers.
    - `range`, for `sym` integers of b bits: `narrow` scale = absmax / (2^(b-1) - 1); `half` absmax / (2^(b-1) - 1/2);
      `full` absmax / 2^(b-1); `signed` the entry of largest magnitude maps to -2^(b-1), so the scale carries a sign.
      Default `signed` for weights (`when` unset), `half` for activations and where scales have no sign, `narrow` for
      ternary and shared exponents, `full` for unsigned integers (scale = max / (2^b - 1); negative entries clamp to 0).
    - `granularity`: `tensor`, `channel [axis=]`, `token`, `group=N [axis=]`, `block=RxC`. Default `channel` for
      weights, `token` where dynamic, `tensor` where static. Default axis: for `group` the last; for `channel` the
      first of a weight and the last of an activation; `axis=0,1` keeps two.
    - `stack=0`: that axis stacks tensors (experts); what a tensor has one of, each of them has.
    - `scale`: `scale=f32` (default), `f16`, `bf16`, `pow2` (rounded up), `pow2(floor)`, `pow2(round)`, `pow2(midmax)`,
      `e8m0(rule)`, `e4m3` (with a global scale), `e4m3(bare)`, `micro(16)`; `double=8x256` quantizes the scales (see
      `qcompile.numerics.scale_type`). `scaling_min=1e-5` keeps them from being smaller.
    - `zero`: `zero=none` for `sym`; `zero=int` (in the code range; default), `zero=float`, or `zero=8x128` (quantized
      as `double` scales are) for `asym`.
    - `via=e4m3fn`: values are rounded to that element, one scale per tensor, before they are quantized and after they
      are dequantized, so that a kernel can compute with it.
    - `when`: `static` or `dynamic` for activations, unset for weights; `no_scale` casts to a float element.
    - `observer`: `absmax` (default of `sym`), `minmax` (default of `asym`), `percentile=99.999`, `mse`, `mse=2.4`,
      `golden`, `hqo`.

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
    via: FloatElement | None = None
    stack: int | None = None
    scaling_min: float | None = None

    def __post_init__(self) -> None:
        if (reason := impossible(self)) is not None:
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

    def fields(self) -> dict[str, str | int | float]:
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
        """Whether codes can be negative: they are held as int8, not uint8."""
        return self.storage == torch.int8

    @property
    def has_negatives(self) -> bool:
        """Whether values can be negative: not where an unsigned integer has no zero-point."""
        return self.signed or not self.symmetric or not isinstance(self.element, IntElement)

    @property
    def qmin(self) -> int:
        """The lowest code in use."""
        if not isinstance(self.element, IntElement):
            return 0
        return self.element.lowest + (self.range == "narrow" and not self.element.ternary)

    @property
    def qmax(self) -> int:
        """The highest code in use."""
        return self.element.highest if isinstance(self.element, IntElement) else (1 << self.bits) - 1

    @property
    def storage(self) -> torch.dtype:
        """The dtype of a codes tensor: torch.int8 or torch.uint8, one code each."""
        return self.element.storage

    @property
    def scale_dtype(self) -> torch.dtype:
        """The dtype of a scale tensor as it is stored."""
        return scale_dtype(self.scale)

    @property
    def zero_dtype(self) -> torch.dtype:
        """The dtype of a zero-point tensor as it is stored."""
        return zero_type(self)[0]

    @property
    def keeps_nan(self) -> bool:
        """Whether nan and infinity in a tensor have a home: a nan scale, or a code of their own."""
        if isinstance(self.scale, E8M0Scale):
            return True
        return self.when == "no_scale" and self.element.has_nan

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The scale's shape for a tensor of `shape` (sizes may be symbolic); SpecError where groups do not divide."""
        return self.granularity.scale_shape(shape)

    def parameters(self, shape: Sequence[int]) -> tuple[Parameter, ...]:
        """What is stored beside the codes of a tensor of `shape`: scale, zero-point (asym), and what decoding those
        needs ("outer" parameters), in the order of `choose_qparams`'s result. Raises as `scale_shape` does.
        """
        return parameters(self, shape)

    def bits_per_element(self, shape: Sequence[int]) -> float:
        """Bits of codes and of all parameters together, over the elements of a tensor of `shape`."""
        if (elements := math.prod(shape)) == 0:
            return float(self.bits)
        return self.bits + sum(p.bits * math.prod(p.shape) for p in self.parameters(shape)) / elements

    def quantize(self, tensor: Tensor) -> QTensor:
        """Choose parameters for `tensor` (any float dtype) and round it: codes, parameters and this spec."""
        from qcompile.numerics.qtensor import quantize_tensor  # that module needs this one

        return quantize_tensor(tensor, self)
