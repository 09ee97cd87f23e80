"""Scales as arithmetic: from a range to the scale a type can hold, to what is stored, and to steps.

Three forms of a scale, in one shape:

- *unit*, float32: a value that the scale type can hold. Searches run over units.
- *stored*: the tensor that goes into a file, of the type's own dtype, with the outer parameters beside it.
- *step*, float32: what a value is divided by to become a code.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from qcompile.numerics.blocks import inner_axes, split, spread
from qcompile.numerics.element import FloatElement, IntElement
from qcompile.numerics.parameters import outer_names
from qcompile.numerics.scale_type import (
    DTYPES,
    DoubleScale,
    E4M3Scale,
    E8M0Scale,
    FloatScale,
    MicroScale,
    Pow2Scale,
    Rounding,
    Rule,
    scaling_min,
)

if TYPE_CHECKING:
    from qcompile.numerics.spec import QuantSpec

E4M3 = FloatElement(4, 3, "ocp")


def to_units(raw: Tensor, largest: Tensor, high: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...]) -> Tensor:
    """Units for groups that ask for steps `raw` (0 where a group is all zeros) and have `largest` magnitudes and `high`
    as their greatest entry.

    All float32 or float64, of one shape; `outer` holds the global scale where the type has one.
    """
    match spec.scale:
        case FloatScale(name):
            floor = max(scaling_min(spec.scale), spec.scaling_min or 0)
            return _to_float(torch.where(raw == 0, 1.0, raw), DTYPES[name], floor)
        case Pow2Scale(rounding):
            return _pow2(torch.where(raw == 0, 1.0, raw), rounding)
        case E8M0Scale(rule):
            return _e8m0(largest, high, rule, spec)
        case E4M3Scale():
            magnitude = raw.abs().to(torch.float32)
            magnitude = E4M3.round(magnitude * outer[0] if spec.scale.shared else magnitude)
            # No scale is 0: a group too small for the least one keeps it, and so do groups of zeros.
            magnitude = magnitude.clamp(min=2.0**-9)
            return torch.where(raw < 0, -magnitude, magnitude)
    if isinstance(spec.scale, MicroScale):
        return largest  # exponents are taken from ranges, when all are known
    # Double-quantized scales are rounded all together; until then a float32 stands for each of them.
    return _to_float(torch.where(raw == 0, 1.0, raw), torch.float32, 2.0**-126)


def to_stored(units: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...]) -> tuple[Tensor, tuple[Tensor, ...]]:
    """What is stored for `units`, and the outer parameters of the scale."""
    match spec.scale:
        case FloatScale(name):
            return units.to(DTYPES[name]), ()
        case E8M0Scale():
            # The exponent field of a float32 is the code: 0 for 2^-127, a subnormal, and 255 for nan.
            return ((units.view(torch.int32) >> 23) & 255).to(torch.uint8).view(torch.float8_e8m0fnu), ()
        case E4M3Scale(shared):
            return units.to(torch.float8_e4m3fn), outer if shared else ()
        case DoubleScale() as double:
            return encode_double(units, double, positive=True)
    return units, ()


def to_steps(scale: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...]) -> Tensor:
    """The float32 step of every stored scale; `outer` are all outer parameters, in the order of the spec."""
    own = dict(zip(outer_names(spec), outer, strict=True))
    match spec.scale:
        case DoubleScale():
            return decode_double(scale, own["scale_step"], own.get("scale_offset"), spec.scale)
        case MicroScale():
            return _micro_steps(scale, own["exponent"], spec)
        case E4M3Scale(shared=True):
            return unit_steps(scale.to(torch.float32), spec, (own["global_scale"],))
    return unit_steps(scale.to(torch.float32), spec, ())


def unit_steps(units: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...]) -> Tensor:
    """The steps of units."""
    if isinstance(spec.scale, E4M3Scale) and spec.scale.shared:
        return units / outer[0]
    if isinstance(spec.scale, E8M0Scale):
        if spec.scale.rule == "noclip":
            units = units * (2.0 ** (spec.element.emax + 1) / spec.element.largest)
        if isinstance(spec.element, IntElement) and spec.element.fraction:
            units = units * 2.0**-spec.element.fraction
    return units


def global_scale(raw: Tensor, largest: Tensor, spec: QuantSpec, shape: tuple[int, ...]) -> Tensor:
    """The global scale, float32 of `shape`, that stores the largest of steps `raw` as 448; 1 where all of them are 0.

    448 * element.largest / amax, in float32 and in this order, as NVFP4 encoders compute it.
    """
    of_int = isinstance(spec.element, IntElement)
    magnitudes = (raw.abs() if of_int else largest).to(torch.float32)
    axes = [axis for axis, n in enumerate(shape) if n == 1]
    if magnitudes.numel() == 0:
        return torch.ones(shape, device=raw.device)
    amax = magnitudes.amax(axes, keepdim=True) if axes else magnitudes
    # Not number / tensor, which torch computes as a product with the reciprocal.
    found = torch.full_like(amax, 448.0 * (1.0 if of_int else spec.element.largest)) / amax
    return torch.where(amax > 0, found.clamp(max=torch.finfo(torch.float32).max), 1.0)


def encode_double(values: Tensor, double: DoubleScale, *, positive: bool) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Integers for `values` (float32, any shape), with the step (and offset) of each run of neighbours.

    `positive`: 0 is no value; a symmetric code that would be 0 is 1, or -1 where the value is negative.
    """
    flat = values.reshape(-1)
    count = flat.numel()
    short = -count % double.group
    # The last run repeats its last value, which moves no extreme.
    rows = torch.cat([flat, flat[-1:].expand(short)]).view(-1, double.group) if count else flat.view(0, double.group)
    if double.symmetric:
        top = (1 << (double.bits - 1)) - 1
        step = rows.abs().amax(1) / top
        step = torch.where(step == 0, 1.0, step).clamp(min=2.0**-126)
        codes = (rows / step.unsqueeze(1)).round_().clamp_(-top, top)
        if positive:
            codes = torch.where(codes == 0, torch.copysign(torch.ones_like(codes), rows), codes)
        return codes.to(torch.int8).view(-1)[:count].view(values.shape), (step,)
    low, high = rows.amin(1), rows.amax(1)
    step = (high - low) / ((1 << double.bits) - 1)
    step = torch.where(step == 0, 1.0, step).clamp(min=2.0**-126)
    codes = ((rows - low.unsqueeze(1)) / step.unsqueeze(1)).round_().clamp_(0, (1 << double.bits) - 1)
    return codes.to(torch.uint8).view(-1)[:count].view(values.shape), (step, low)


def decode_double(codes: Tensor, step: Tensor, offset: Tensor | None, double: DoubleScale) -> Tensor:
    """The float32 values of double-quantized codes: offset + code * step."""
    count = codes.numel()
    values = codes.reshape(-1).to(torch.float32) * step.repeat_interleave(double.group)[:count]
    if offset is not None:
        values = values + offset.repeat_interleave(double.group)[:count]
    return values.view(codes.shape)


def micro_parameters(largest: Tensor, spec: QuantSpec, block_shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Shift bits (uint8, one a group) and exponents (uint8, biased by 127, one a block) for magnitudes `largest`.

    Exponents are the fields of float32 numbers: subnormals and 0 count as 2^-127.
    """
    field = ((largest.to(torch.float32).view(torch.int32) >> 23) & 255).to(torch.uint8)
    view, inner = split(field, block_shape), inner_axes(field.shape, block_shape)
    exponent = view.amax(inner, keepdim=True).reshape(block_shape) if field.numel() else field.new_zeros(block_shape)
    return (view < spread(exponent, field.shape)).to(torch.uint8).reshape(field.shape), exponent


def _micro_steps(shift: Tensor, exponent: Tensor, spec: QuantSpec) -> Tensor:
    """2^(E - shift - m + 2) for m bits, sign included: built from its bits, as a subnormal where it is one."""
    down = split(shift, exponent.shape).to(torch.int32) + (spec.bits - 2)
    field = (spread(exponent, shift.shape).to(torch.int32) - down).reshape(shift.shape)
    pattern = torch.where(field > 0, field << 23, torch.ones_like(field) << (22 + field).clamp(0, 22))
    return pattern.view(torch.float32)


def _to_float(step: Tensor, dtype: torch.dtype, floor: float) -> Tensor:
    """`step` rounded to what `dtype` holds, magnitudes within [floor, largest finite], the sign kept.

    float64 goes through float32 to the half types, so that float32 and float64 callers agree.
    """
    magnitude = step.abs().clamp(floor, torch.finfo(dtype).max).to(torch.float32)
    return torch.copysign(magnitude, step.to(torch.float32)).to(dtype).to(torch.float32)


def _pow2(magnitude: Tensor, rounding: Rounding) -> Tensor:
    # magnitude = mantissa * 2^exponent, the mantissa in [1/2, 1): candidates are 2^(exponent - 1) and 2^exponent.
    mantissa, exponent = torch.frexp(magnitude)
    match rounding:
        case "floor":
            up = torch.zeros_like(mantissa, dtype=torch.bool)
        case "round":
            up = mantissa >= 0.75
        case "midmax":
            # Compared in float64, where no float32 mantissa equals the irrational threshold.
            up = mantissa.to(torch.float64) > math.sqrt(0.5)
        case _:
            up = mantissa > 0.5
    exponent = (exponent - (~up).to(torch.int32)).clamp(-126, 127)
    # Built from its bits: exact whatever the accuracy of pow or exp2 on the device.
    return ((exponent + 127) << 23).to(torch.int32).view(torch.float32)


def _e8m0(largest: Tensor, high: Tensor, rule: Rule, spec: QuantSpec) -> Tensor:
    """The power of two of each group by `rule`; 2^-127 for a group of zeros, nan where `largest` is not finite."""
    element = spec.element
    mantissa, exponent = torch.frexp(largest)
    exponent = exponent - 1
    if rule == "ceil":
        exponent = exponent + (mantissa > 0.5)
    elif rule == "even" and largest.dtype == torch.float32:
        # Half a unit of the element's last place is added to the bits; subnormals have the least exponent's unit.
        exponent = ((largest.view(torch.int32) + (1 << (22 - element.mantissa_bits))) >> 23) - 127
    elif rule == "even":
        exponent = exponent + (mantissa >= 1 - 2.0 ** -(element.mantissa_bits + 2))
    elif rule == "bfp":
        # There is one code more below 0 than above, so that only positive entries can pass the last one.
        top = torch.ldexp(high, -(exponent + 1))
        exponent = exponent + (top >= 1 - 2.0**-spec.bits)
    elif rule == "rceil":
        # largest / element.largest <= 2^k, compared as fractions in [1/2, 1): no division that rounds.
        bound, shift = math.frexp(element.largest)
        exponent = exponent + 1 - shift + (mantissa > bound)
    if rule != "rceil":
        exponent = exponent - element.emax
    biased = torch.where(largest > 0, exponent, -127).clamp(-127, 127).to(torch.int32) + 127
    pattern = torch.where(biased > 0, biased << 23, 1 << 22)
    return torch.where(torch.isfinite(largest), pattern, 0x7FC00000).to(torch.int32).view(torch.float32)
