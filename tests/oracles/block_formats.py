"""Block formats straight from their definitions: MX, NVFP4, block floating point, MX6 and MX9; and blocks to try them on.

Sharing nothing with qcompile.numerics: numpy, and the value tables of ml_dtypes. A block is the last axis of a float32
array of any rank. Quotients by a power of two are taken in float64, where they are exact, and rounded once, to nearest,
ties to even. An e8m0 code c means 2^(c - 127); 255 is nan, and then so are the block's values; its codes mean nothing.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

RULES = ("floor", "even", "ceil", "rceil", "mse", "noclip")
MSE_ORDER = (0, 1, -1, 2)
"""What `mse` tries beside the floor exponent; of equals the first is taken."""


@dataclass(frozen=True)
class Element:
    """A sign-magnitude float of at most eight bits, or the int8 of MXINT8 (two's complement, code times 2^-6)."""

    name: str
    magnitudes: NDArray[np.float64]
    """The finite values from 0 up, at the index that is their code."""
    sign: int
    """The sign bit; 0 for int8."""
    nan: int
    """The code that a nan becomes; 0 where the type has none."""
    mantissa_bits: int
    """Bits after the leading one."""

    @property
    def largest(self) -> float:
        return float(self.magnitudes[-1])

    @property
    def emax(self) -> int:
        return int(np.frexp(self.largest)[1]) - 1


def _float_element(name: str, dtype: str, codes: int, sign: int, nan: int, mantissa_bits: int) -> Element:
    values = np.arange(codes, dtype=np.uint8).view(getattr(ml_dtypes, dtype)).astype(np.float64)
    return Element(name, values, sign, nan, mantissa_bits)


ELEMENTS = {
    "e4m3": _float_element("e4m3", "float8_e4m3fn", 0x7F, 0x80, 0x7F, 3),
    "e5m2": _float_element("e5m2", "float8_e5m2", 0x7C, 0x80, 0x7E, 2),
    "e3m2": _float_element("e3m2", "float6_e3m2fn", 0x20, 0x20, 0, 2),
    "e2m3": _float_element("e2m3", "float6_e2m3fn", 0x20, 0x20, 0, 3),
    "e2m1": _float_element("e2m1", "float4_e2m1fn", 0x08, 0x08, 0, 1),
    "int8": Element("int8", np.arange(128) / 64, 0, 0, 6),
}


class Encoded(NamedTuple):
    """A block format's parts. `scale` has the shape of the input without its last axis.

    `scale` is uint8: an e8m0 code (MX, BFP), e4m3fn bits (NVFP4) or an exponent + 127 (MX6, MX9). `codes` are uint8 bit
    patterns, int8 where the element is an integer. `values` are float32. `micro`, for MX6 and MX9 only, is uint8 with
    one shift of 0 or 1 a pair; `outer`, for NVFP4 only, the float32 global scale.
    """

    scale: NDArray[np.uint8]
    codes: Array
    values: NDArray[np.float32]
    micro: NDArray[np.uint8] | None = None
    outer: np.float32 | None = None


def encode(y: Array, element: Element) -> Array:
    """Codes of `y` (float32 or float64): nearest, ties to the even code, saturating (infinities too); -0 keeps its sign."""
    y = np.asarray(y, dtype=np.float64)
    size = np.minimum(np.abs(y), element.largest)
    middles = (element.magnitudes[1:] + element.magnitudes[:-1]) / 2
    code = np.searchsorted(middles, np.nan_to_num(size))  # a tie goes to the lower code
    tie = size == middles[np.minimum(code, len(middles) - 1)]
    code = code + (tie & (code % 2 == 1))
    signed = np.where(np.signbit(y), code + element.sign if element.sign else -code, code)
    return np.where(np.isnan(y), element.nan, signed).astype(np.uint8 if element.sign else np.int8)


def decode(codes: Array, element: Element) -> NDArray[np.float64]:
    if not element.sign:
        return codes.astype(np.float64) / 64
    size = codes & (element.sign - 1)
    finite = element.magnitudes[np.minimum(size, len(element.magnitudes) - 1)]
    value = np.where(size < len(element.magnitudes), finite, np.nan)  # nan; infinities are never written
    return np.where(codes & element.sign, -value, value)


def largest_magnitude(x: Array) -> NDArray[np.float64]:
    """Of each block, in float64; nan where it holds a nan or an infinity."""
    amax = np.max(np.abs(np.asarray(x, dtype=np.float32)), axis=-1).astype(np.float64)
    return np.where(np.isfinite(amax), amax, np.nan)


def scale_exponent(amax: NDArray[np.float64], element: Element, rule: str) -> Array:
    """The exponent of the scale by every rule but mse, before it is clamped to -127…127; any number where amax is 0 or nan.

    floor, noclip: floor(log2 amax) - emax. ceil: ceil(log2 amax) - emax. rceil: ceil(log2(amax / largest)), exact.
    even: half a unit of the element's last mantissa bit is added to amax's float32 bits, then as floor.
    """
    amax = np.nan_to_num(amax)
    mantissa: Array
    power: Array
    mantissa, power = np.frexp(amax)  # mantissa in [1/2, 1)
    exponent: Array = power.astype(np.int64)
    if rule in ("floor", "noclip"):
        exponent = exponent - 1 - element.emax
    elif rule == "even":
        bits = amax.astype(np.float32).view(np.int32) + (1 << (22 - element.mantissa_bits))
        exponent = (bits >> 23) - 127 - element.emax
    elif rule == "ceil":
        exponent = exponent - (mantissa == 0.5) - element.emax
    elif rule == "rceil":
        top, place = np.frexp(element.largest)
        exponent = exponent - int(place) + (mantissa > top)
    else:
        raise ValueError(f"no rule {rule!r}; there are {', '.join(RULES)}")
    return exponent


def _with_exponent(x: Array, exponent: Array, element: Element, rule: str) -> tuple[Array, NDArray[np.float32]]:
    scale = np.exp2(exponent.astype(np.float64))[..., None]
    # noclip: the scale is 4/3 of what is stored. Three times a float32 is exact here, and so is the quotient.
    codes = encode(x.astype(np.float64) * 3 / (4 * scale) if rule == "noclip" else x / scale, element)
    values = decode(codes, element) * scale
    with np.errstate(over="ignore"):
        return codes, (values * 4 / 3 if rule == "noclip" else values).astype(np.float32)


def mx(x: Array, element: Element | str, rule: str = "floor") -> Encoded:
    """OCP MX v1.0, section 6.3 (rule floor), with any block size and rule.

    An all-zero block has scale code 0. Exponents are clamped to -127…127. A nan or an infinity makes the scale code 255.
    Close to the top of float32, ceil, even and rceil round values up to infinity: 1.9 · 2^127 in e2m1 is 4 · 2^126.
    mse: least sum of squared errors (float64) over `MSE_ORDER`. noclip (FP-Quant, e2m1): values are q · 2^e · 4 / 3.
    """
    element = ELEMENTS[element] if isinstance(element, str) else element
    if rule == "noclip" and element.name != "e2m1":
        raise ValueError(f"noclip is a rule of e2m1, not of {element.name}")
    x, amax = np.asarray(x, dtype=np.float32), largest_magnitude(x)
    first = scale_exponent(amax, element, "floor" if rule == "mse" else rule)
    nan = np.isnan(amax)
    finite = np.where(nan[..., None], np.float32(0), x)
    tried: list[tuple[Array, Array, Array]] = []
    for offset in MSE_ORDER if rule == "mse" else (0,):
        exponent = np.where(amax > 0, np.clip(first + offset, -127, 127), -127)
        tried.append((exponent, *_with_exponent(finite, exponent, element, rule)))
    errors = [np.sum((finite.astype(np.float64) - values) ** 2, axis=-1) for _, _, values in tried]
    least = np.argmin(errors, axis=0)  # the first of equals
    exponent = np.choose(least, [t[0] for t in tried])
    codes = np.choose(least[..., None], [t[1] for t in tried])
    values = np.choose(least[..., None], [t[2] for t in tried])
    return Encoded(
        np.where(nan, 255, exponent + 127).astype(np.uint8),
        np.where(nan[..., None], element.nan, codes).astype(codes.dtype),
        np.where(nan[..., None], np.float32(np.nan), values),
    )


def global_scale(x: Array) -> np.float32:
    """448 · 6 / amax of the finite entries, in float32; 1 where they are all 0, the largest float32 where it overflows."""
    x = np.asarray(x, dtype=np.float32)
    amax = np.max(np.abs(x), initial=0, where=np.isfinite(x))
    if amax == 0:
        return np.float32(1)
    with np.errstate(over="ignore"):
        return np.float32(min(np.float32(2688) / np.float32(amax), np.finfo(np.float32).max))


def _with_e4m3(x: Array, codes: Array, outer: np.float32) -> tuple[Array, NDArray[np.float32]]:
    stored = decode(codes, ELEMENTS["e4m3"]).astype(np.float32)
    step = (stored / outer)[..., None]
    with np.errstate(over="ignore", under="ignore"):
        chosen = encode(x / step, ELEMENTS["e2m1"])
        return chosen, decode(chosen, ELEMENTS["e2m1"]).astype(np.float32) * step


def nvfp4(x: Array, outer: np.float32 | None = None, search: bool = False, window: int = 8) -> Encoded:
    """NVFP4: `outer` (g) is one per tensor, `global_scale(x)` where none is given. Everything in float32, in this order:

    scale = e4m3fn(amax / 6 · g), saturating, at least 2^-9, the least positive one; step = scale / g;
    codes = e2m1(x / step); values = q · step. A nan or an infinity in a block makes its scale nan (0x7F).
    `search`: the positive scale with the least sum of squared errors (float64) among the plain one's `window` neighbours
    to each side; of equals the nearest in code, the greater first.
    """
    x = np.asarray(x, dtype=np.float32)
    outer = global_scale(x) if outer is None else np.float32(outer)
    amax = largest_magnitude(x)
    nan = np.isnan(amax)
    with np.errstate(over="ignore", under="ignore"):
        plain = encode(np.nan_to_num(amax).astype(np.float32) / np.float32(6) * outer, ELEMENTS["e4m3"])
    finite = np.where(nan[..., None], np.float32(0), x)
    plain = np.maximum(plain, 1)
    best_scale = plain
    codes, values = _with_e4m3(finite, plain, outer)
    least = np.sum((finite.astype(np.float64) - values) ** 2, axis=-1)
    for offset in [side * n for n in range(1, window + 1) for side in (1, -1)] if search else []:
        scale = np.clip(plain.astype(np.int64) + offset, 1, 0x7E).astype(np.uint8)
        tried, result = _with_e4m3(finite, scale, outer)
        error = np.sum((finite.astype(np.float64) - result) ** 2, axis=-1)
        better = error < least
        least, best_scale = np.where(better, error, least), np.where(better, scale, best_scale)
        codes = np.where(better[..., None], tried, codes)
        values = np.where(better[..., None], result, values)
    scale = np.where(nan, 0x7F, best_scale).astype(np.uint8)
    return Encoded(scale, codes, np.where(nan[..., None], np.float32(np.nan), values), outer=outer)


def bfp(x: Array, bits: int = 8) -> Encoded:
    """Block floating point: integers of `bits` bits times 2^(floor(log2 amax) - bits + 2), an e8m0 scale.

    Where some code rounds to +2^(bits-1) the exponent goes up by one; -2^(bits-1) is a code and stays.
    """
    x, amax = np.asarray(x, dtype=np.float32), largest_magnitude(x)
    nan = np.isnan(amax)
    finite = np.where(nan[..., None], 0, x).astype(np.float64)
    exponent = np.frexp(np.nan_to_num(amax))[1].astype(np.int64) - 1 - (bits - 2)
    exponent = np.where(amax > 0, np.maximum(exponent, -127), -127)
    codes = np.rint(finite / np.exp2(exponent.astype(np.float64))[..., None])
    exponent = np.minimum(exponent + np.any(codes == 2 ** (bits - 1), axis=-1), 127)
    scale = np.exp2(exponent.astype(np.float64))[..., None]
    codes = np.minimum(np.rint(finite / scale), 2 ** (bits - 1) - 1)
    values = np.where(nan[..., None], np.nan, codes * scale).astype(np.float32)
    return Encoded(np.where(nan, 255, exponent + 127).astype(np.uint8), codes.astype(np.int8), values)


def microexponent(x: Array, bits: int) -> Encoded:
    """MX9 (bits 8), MX6 (bits 5) and MX4 (bits 3) of arXiv 2302.08007: sign and bits - 1 bits of magnitude a code.

    Exponents are the float32 fields of magnitudes, a subnormal's counting as -127. E is that of the block, stored as E + 127;
    a pair's shift is 1 where both are below E. Values are code · 2^(E - shift - bits + 2), codes clamped to
    ±(2^(bits-1) - 1). An all-zero block is all zero bytes. Not in the paper: a nan or an infinity makes the stored
    exponent 255.
    """
    x, amax = np.asarray(x, dtype=np.float32), largest_magnitude(x)
    nan = np.isnan(amax)
    finite = np.where(nan[..., None], np.float32(0), x)
    field = (finite.view(np.uint32) >> 23 & 255).astype(np.int64)
    exponent = field.max(axis=-1, keepdims=True)
    pairs = field.reshape(*field.shape[:-1], -1, 2)
    micro = np.all(pairs < exponent[..., None], axis=-1).astype(np.uint8)
    step = np.exp2(exponent - 127.0 - np.repeat(micro, 2, axis=-1) - bits + 2)
    limit = 2 ** (bits - 1) - 1
    codes = np.clip(np.rint(finite / step), -limit, limit)
    values = np.where(nan[..., None], np.nan, codes * step).astype(np.float32)
    return Encoded(np.where(nan, 255, exponent[..., 0]).astype(np.uint8), codes.astype(np.int8), values, micro)


def relative_error(x: Array, values: Array) -> float:
    """Mean over blocks of sum (x - x̂)² / sum x²."""
    wide = x.astype(np.float64)
    return float(np.mean(np.sum((wide - values) ** 2, axis=-1) / np.sum(wide**2, axis=-1)))


KINDS = ("gaussian", "laplace", "outlier", "magnitudes", "ties", "edges", "zero", "tiny", "huge", "nonfinite")


def make_blocks(kind: str, seed: int, count: int, size: int) -> NDArray[np.float32]:
    """`count` blocks of `size` entries, float32.

    outlier: one entry of a Gaussian block is 10 to 1000 times as large. magnitudes: any finite bit pattern, in every
    other block near one exponent. ties: few significant bits, so that entries fall halfway between codes. edges: the
    entry of largest magnitude is where some rule changes the scale, or a float32 beside it. zero: 0 and -0. tiny,
    huge: largest magnitudes about the ends of float32. nonfinite: Gaussian blocks, most with nan or infinities.
    """
    rng = np.random.default_rng((seed, KINDS.index(kind), size))
    normal = rng.standard_normal((count, size))
    power = rng.integers(-60, 60, (count, 1))
    places = np.arange(count), rng.integers(0, size, count)
    if kind == "laplace":
        normal = rng.laplace(size=(count, size))
    elif kind == "outlier":
        normal[places] *= 10 ** rng.uniform(1, 3, count)
    elif kind == "magnitudes":
        bits = rng.integers(0, 0x7F800000, (count, size), dtype=np.uint32)
        near = rng.integers(4, 251, (count, 1), dtype=np.uint32) + rng.integers(-4, 4, (count, size)).astype(np.uint32)
        bits[::2] = (bits & 0x007FFFFF | near << 23)[::2]
        return (bits | rng.integers(0, 2, (count, size), dtype=np.uint32) << 31).view(np.float32)
    elif kind == "ties":
        width = rng.integers(1, 9, (count, 1))
        odd = 2 * rng.integers(0, 2**width, (count, size)) + 1
        normal = (
            np.where(rng.random((count, size)) < 0.5, -1, 1) * odd * np.exp2(power - rng.integers(0, 7, (count, size)))
        )
    elif kind == "edges":
        top = rng.choice([1, 1.5, 1.75, 1.875, 1.9375, 1.96875, 1.984375, 1.9921875, 1.99609375, 2 - 2.0**-23], count)
        edge = (top * np.exp2(power[:, 0])).astype(np.float32)
        edge = (edge.view(np.int32) + rng.integers(-2, 3, count).astype(np.int32)).view(np.float32)
        normal = rng.uniform(-1, 1, (count, size)) * edge[:, None]
        normal[places] = edge * rng.choice([-1, 1], count)
    elif kind == "zero":
        return np.where(rng.random((count, size)) < 0.3, np.float32(-0.0), np.float32(0))
    elif kind == "tiny":
        normal = normal * np.exp2(rng.integers(-152, -110, (count, 1)))
    elif kind == "huge":
        largest = np.finfo(np.float32).max
        normal = np.clip(normal * np.exp2(rng.integers(118, 128, (count, 1))), -largest, largest)
    elif kind == "nonfinite":
        normal = np.where(
            rng.random((count, size)) < 2 / size, rng.choice([np.nan, np.inf, -np.inf], (count, size)), normal
        )
    with np.errstate(under="ignore"):
        return normal.astype(np.float32)
