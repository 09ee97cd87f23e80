"""Which combinations of spec fields make no sense, and the way out of each."""

from __future__ import annotations

from typing import TYPE_CHECKING

from qcompile.numerics.criterion import AbsMax, HalfQuadratic, LeastError, MinMax, Percentile
from qcompile.numerics.element import FloatElement, IntElement
from qcompile.numerics.granularity import PerBlock, PerGroup, PerTensor, PerToken
from qcompile.numerics.scale_type import (
    F32,
    DoubleScale,
    E4M3Scale,
    E8M0Scale,
    FloatScale,
    MicroScale,
    Pow2Scale,
    unsigned,
)

if TYPE_CHECKING:
    from qcompile.numerics.spec import QuantSpec


def impossible(spec: QuantSpec) -> str | None:
    """Why `spec` cannot be, and the way out; None where it can."""
    for check in (_range, _zero, _scale, _shared_exponent, _when, _observer, _via):
        if (reason := check(spec)) is not None:
            return reason
    return None


def _range(spec: QuantSpec) -> str | None:
    element = spec.element
    if spec.range not in ("signed", "half", "full", "narrow"):
        return f"unknown range {spec.range!r}; use signed, half, full or narrow"
    if not isinstance(element, IntElement):
        if not spec.symmetric:
            return f"{element} has no zero-point; drop asym, or use an integer"
        return None if spec.range == "full" else f"range {spec.range} is for integers; drop it"
    if element.ternary:
        if not spec.symmetric:
            return "ternary has no zero-point; use sym, or int2 asym"
        return (
            None if spec.range == "narrow" else f"ternary is the narrow two-bit range; drop {spec.range}, or use int2"
        )
    if not spec.symmetric:
        return None if spec.range == "full" else f"asym always uses every code; drop {spec.range}, or use sym"
    if not element.signed:
        way_out = f"drop {spec.range}, or use int{spec.bits}"
        return None if spec.range == "full" else f"range {spec.range} needs negative codes; {way_out}"
    if spec.bits == 1 and spec.range in ("narrow", "half"):
        return f"range {spec.range} rounds every value to 0 with one bit; use signed, or asym"
    if spec.range == "signed" and unsigned(spec.scale):
        return f"range signed needs scales with a sign, and {spec.scale} has none; use half, full or narrow"
    return None


def _zero(spec: QuantSpec) -> str | None:
    if not isinstance(spec.zero, DoubleScale) and spec.zero not in ("none", "int", "float"):
        return f"unknown zero {spec.zero!r}; use zero=int, zero=float, zero=none or zero=8x128"
    if spec.symmetric and spec.zero != "none":
        return f"sym has no zero-point; drop zero={spec.zero}, or use asym"
    if not spec.symmetric and spec.zero == "none":
        return "asym needs a zero-point; drop zero=none, or use sym"
    return None


def _scale(spec: QuantSpec) -> str | None:
    if not isinstance(spec.scale, FloatScale | Pow2Scale | E8M0Scale | E4M3Scale | DoubleScale | MicroScale):
        return f"unknown scale {spec.scale!r}; use scale=f32"
    if spec.scaling_min is not None:
        if not isinstance(spec.scale, FloatScale):
            return f"scaling_min is for scales that are floats, not {spec.scale}; drop it"
        if not 0 < spec.scaling_min < 1e30:
            return f"scaling_min={spec.scaling_min:g} is no small positive number; write scaling_min=1e-5"
    if isinstance(spec.element, IntElement) and spec.element.fraction:
        own = f"the fraction of {spec.element}"
        return (
            None
            if isinstance(spec.scale, E8M0Scale)
            else f"{own} only shifts a float scale; use scale=e8m0, or drop it"
        )
    doubled = isinstance(spec.scale, DoubleScale) or isinstance(spec.zero, DoubleScale)
    return (
        "double quantization is for weights; drop double= and zero=NxM" if doubled and spec.when is not None else None
    )


def _shared_exponent(spec: QuantSpec) -> str | None:
    """Scales that are exponents chosen from the largest magnitude."""
    element, scale = spec.element, spec.scale
    if not isinstance(scale, E8M0Scale | MicroScale):
        return None
    if not spec.symmetric:
        return f"{scale} scales follow the largest magnitude, which asym has no use for; use sym, or scale=pow2"
    if isinstance(element, IntElement):
        wanted = "full" if scale == E8M0Scale("bfp") else "narrow"
        if not element.signed or spec.bits == 1 or spec.range != wanted:
            return f"{scale} scales are for signed integers of two bits or more in the {wanted} range; use scale=pow2"
    elif not isinstance(element, FloatElement):
        return f"{scale} scales need an element with an exponent or an integer, not {element}; use scale=f32"
    if (
        isinstance(scale, E8M0Scale)
        and scale.rule == "bfp"
        and (not isinstance(element, IntElement) or element.fraction or element.ternary)
    ):
        return "the bfp rule is for plain integers; use another rule, as e8m0(floor)"
    if not isinstance(scale, MicroScale):
        return None
    if not isinstance(element, IntElement) or element.fraction or element.ternary:
        return f"micro exponents are for plain integers, not {element}; use int5 or int8"
    if (
        not isinstance(spec.granularity, PerGroup)
        or scale.block % spec.granularity.size
        or (scale.block == spec.granularity.size)
    ):
        return f"{scale} needs groups that divide its block of {scale.block}; use group=2"
    return (
        None if isinstance(spec.observer, AbsMax) else "micro exponents follow the largest magnitude; drop the observer"
    )


def _when(spec: QuantSpec) -> str | None:
    if spec.when not in (None, "static", "dynamic", "no_scale"):
        return f"unknown when {spec.when!r}; use static, dynamic, no_scale, or none for a weight"
    if spec.when == "static" and isinstance(spec.granularity, PerToken | PerGroup | PerBlock):
        own = f"{spec.granularity} has one scale for every token, unknown before run time"
        return f"{own}; use dynamic, tensor or channel"
    if spec.when != "no_scale":
        return None
    if not isinstance(spec.element, FloatElement):
        return f"no_scale casts to a float element, and {spec.element} is none; use static or dynamic"
    if spec.granularity != PerTensor() or spec.scale != F32 or spec.observer != AbsMax() or spec.via is not None:
        return "no_scale has nothing to choose; drop granularity, scale, observer and via"
    return None


def _observer(spec: QuantSpec) -> str | None:
    observer = spec.observer
    if not isinstance(observer, AbsMax | MinMax | Percentile | LeastError | HalfQuadratic):
        return f"{observer!r} is not an observer; use absmax, minmax, percentile, mse, golden or hqo"
    if spec.symmetric and isinstance(observer, MinMax):
        return "minmax needs a zero-point to move; use absmax, or asym"
    if not spec.symmetric and isinstance(observer, AbsMax):
        return "absmax would waste the codes of the shorter side; use minmax, or sym"
    coarse = isinstance(spec.scale, Pow2Scale | E8M0Scale | E4M3Scale)
    if isinstance(observer, LeastError) and observer.golden and coarse:
        return f"there are few {spec.scale} scales to search; use mse, which tries those around the first"
    if isinstance(observer, HalfQuadratic):
        if spec.when is not None:
            return "hqo is for weights; use mse, or percentile"
        if not isinstance(spec.element, IntElement) or spec.bits == 1:
            return f"hqo is for integers of two bits or more, not {spec.element}; use mse"
        if coarse:
            return f"hqo needs scales that are floats, not {spec.scale}; use mse"
    return None


def _via(spec: QuantSpec) -> str | None:
    if spec.via is None:
        return None
    if spec.via.bits <= spec.bits:
        return f"via={spec.via} has no more bits than {spec.element}; use a wider one, as e4m3fn"
    if not isinstance(spec.scale, FloatScale):
        return f"via= composes with scales that are floats, not {spec.scale}; use scale=f32"
    return "via= is for weights; quantize the activation to that float itself" if spec.when is not None else None
