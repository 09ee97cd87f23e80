"""What is stored beside the codes of a quantized tensor."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.granularity import PerGroup
from qcompile.numerics.scale_type import (
    DoubleScale,
    E4M3Scale,
    FloatScale,
    MicroScale,
    ScaleType,
    scale_bits,
    scale_dtype,
)

if TYPE_CHECKING:
    from qcompile.numerics.spec import QuantSpec


class QParams(NamedTuple):
    """Stored parameters: scale, zero-point (None for `sym`), and the outer ones that decoding those needs."""

    scale: Tensor
    zero_point: Tensor | None
    outer: tuple[Tensor, ...] = ()

    def stored(self) -> list[Tensor]:
        """All tensors, in the order of `QuantSpec.parameters`."""
        return [self.scale, *([] if self.zero_point is None else [self.zero_point]), *self.outer]


@dataclass(frozen=True)
class Parameter:
    """One stored parameter: its name (`scale`, `zero_point`, `global_scale` …), shape, dtype, and bits an entry."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    bits: int


def parameters(spec: QuantSpec, shape: Sequence[int]) -> tuple[Parameter, ...]:
    """See `QuantSpec.parameters`."""
    blocks = spec.scale_shape(shape)
    found = [Parameter("scale", blocks, spec.scale_dtype, scale_bits(spec.scale))]
    if not spec.symmetric:
        found.append(Parameter("zero_point", blocks, *zero_type(spec)))
    found += _scale_outer(spec, shape, blocks)
    if isinstance(spec.zero, DoubleScale):
        found += _double_outer(spec.zero, blocks, "zero")
    if spec.via is not None:
        found.append(Parameter("via_scale", per_tensor(spec, shape), torch.float32, 32))
    return tuple(found)


def outer_names(spec: QuantSpec) -> tuple[str, ...]:
    """Names of the outer parameters, in order."""
    names: list[str] = []
    if isinstance(spec.scale, E4M3Scale) and spec.scale.shared:
        names.append("global_scale")
    elif isinstance(spec.scale, MicroScale):
        names.append("exponent")
    for what, kind in (("scale", spec.scale), ("zero", spec.zero)):
        if isinstance(kind, DoubleScale):
            names += [f"{what}_step"] if kind.symmetric else [f"{what}_step", f"{what}_offset"]
    return (*names, *(("via_scale",) if spec.via is not None else ()))


def per_tensor(spec: QuantSpec, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of what a tensor has one of: ones, but for the axis that stacks tensors."""
    stack = None if spec.stack is None else spec.stack % len(shape)
    return tuple(n if axis == stack else 1 for axis, n in enumerate(shape))


def zero_type(spec: QuantSpec) -> tuple[torch.dtype, int]:
    """Dtype and bits of a zero-point: of codes for `int`; for `float` of scales, float32 where those are no floats."""
    if isinstance(spec.zero, DoubleScale):
        return scale_dtype(spec.zero), spec.zero.bits
    if spec.zero == "int":
        return spec.storage, spec.bits
    kind: ScaleType = spec.scale if isinstance(spec.scale, FloatScale) else FloatScale()
    return scale_dtype(kind), scale_bits(kind)


def _scale_outer(spec: QuantSpec, shape: Sequence[int], blocks: tuple[int, ...]) -> Iterator[Parameter]:
    match spec.scale:
        case E4M3Scale(shared=True):
            yield Parameter("global_scale", per_tensor(spec, shape), torch.float32, 32)
        case DoubleScale() as double:
            yield from _double_outer(double, blocks, "scale")
        case MicroScale(block):
            yield Parameter("exponent", PerGroup(block, _axis(spec)).scale_shape(shape), torch.uint8, 8)


def _axis(spec: QuantSpec) -> int:
    assert isinstance(spec.granularity, PerGroup)
    return spec.granularity.axis


def _double_outer(double: DoubleScale, blocks: tuple[int, ...], what: str) -> Iterator[Parameter]:
    if any(not isinstance(size, int) for size in blocks):
        raise SpecError(f"{what}s of a tensor whose sizes vary cannot be quantized together; use a float scale")
    shape = (-(-math.prod(blocks) // double.group),)
    yield Parameter(f"{what}_step", shape, torch.float32, 32)
    if not double.symmetric:
        yield Parameter(f"{what}_offset", shape, torch.float32, 32)
