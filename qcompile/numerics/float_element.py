"""Floats of 2 to 8 bits as elements: OCP's fp8, fp6 and fp4, the fnuz variants, and any other eXmY."""

from __future__ import annotations

import functools
import itertools
import math
import re
from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.staircase import FLOAT_LAYOUT, Staircase, nan_mask, require_float

Flavour: TypeAlias = Literal["finite", "ocp", "fnuz"]

_TORCH_DTYPES = {
    (4, 3, "ocp"): torch.float8_e4m3fn,
    (5, 2, "ocp"): torch.float8_e5m2,
    (4, 3, "fnuz"): torch.float8_e4m3fnuz,
    (5, 2, "fnuz"): torch.float8_e5m2fnuz,
}


@dataclass(frozen=True)
class FloatElement:
    """A float of one sign bit, `exponent` bits (1 or more) and `mantissa` bits (0 or more), 8 bits at most.

    Exponent bias 2^(exponent-1) - 1; subnormals where the exponent field is 0. Codes are uint8 bit patterns, sign
    highest, in the low `bits` bits. Flavours:

    - `finite`: every code is a number. OCP's e2m1, e2m3 and e3m2 are this.
    - `ocp`: e4m3 (no infinity, nan is S.1111.111, largest 448) and e5m2 (IEEE: infinities and nans, largest 57344), of
      the OCP 8-bit floating point specification 1.0 and MX specification 1.0.
    - `fnuz`: the bias is one larger, and the code of negative zero is the one nan.
    """

    exponent: int
    mantissa: int
    flavour: Flavour = "finite"

    def __post_init__(self) -> None:
        shape = f"e{self.exponent}m{self.mantissa}"
        if self.exponent < 1 or self.mantissa < 0:
            raise SpecError(f"{shape} needs 1 exponent bit and 0 mantissa bits at least; use e2m1, e3m0 or the like")
        if self.bits > 8:
            raise SpecError(
                f"{shape} has {self.bits} bits with its sign, and a float element 8 at most; use e4m3fn, e5m2 or fewer"
            )
        if self.flavour not in ("finite", "ocp", "fnuz"):
            raise SpecError(f"unknown flavour {self.flavour!r} of {shape}; use finite, ocp or fnuz")
        if self.flavour == "ocp" and not self._is_fp8:
            raise SpecError(f"{shape} has no nan in OCP's formats, only e4m3 and e5m2 have; write {shape} for it")

    def __str__(self) -> str:
        shape = f"e{self.exponent}m{self.mantissa}"
        if self.flavour == "finite":
            return f"{shape}(plain)" if self._is_fp8 else shape
        return f"{shape}fnuz" if self.flavour == "fnuz" else {4: "e4m3fn", 5: "e5m2"}[self.exponent]

    @functools.cached_property
    def bits(self) -> int:
        """Bits of one code."""
        return 1 + self.exponent + self.mantissa

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds one code."""
        return torch.uint8

    @property
    def mantissa_bits(self) -> int:
        """Stored bits of the mantissa."""
        return self.mantissa

    @property
    def has_nan(self) -> bool:
        """Whether some code is nan."""
        return self.flavour != "finite"

    @functools.cached_property
    def bias(self) -> int:
        """What is taken off the exponent field."""
        return (1 << (self.exponent - 1)) - (self.flavour != "fnuz")

    @functools.cached_property
    def largest(self) -> float:
        """The greatest finite magnitude."""
        return _magnitude(self, self._finite_codes - 1)

    @property
    def smallest(self) -> float:
        """The least positive value."""
        return _magnitude(self, 1)

    @property
    def emax(self) -> int:
        """floor(log2(largest))."""
        return math.frexp(self.largest)[1] - 1

    @property
    def values(self) -> Tensor:
        """The value of every code, in order: float32, [2^bits]. Shared, so do not write to it."""
        return _values(self, torch.device("cpu"))

    def with_bits(self, bits: int) -> FloatElement:
        """This element, where `bits` is its width; SpecError otherwise, for another width could be several floats."""
        if bits != self.bits:
            raise SpecError(f"{self} has {self.bits} bits, so bits={bits} does not apply; set element=eXmY instead")
        return self

    def encode(self, y: Tensor) -> Tensor:
        """Codes of the values nearest to `y` (float32 or float64, any shape): uint8, in its shape.

        Rounded once, ties to the even code. Beyond `largest`, infinities included, is `largest` with the sign; zero and
        what rounds to it keep the sign but in fnuz. A nan becomes a nan code. Raises SpecError for a nan where the
        element has none, and for other dtypes.
        """
        require_float(y, self)
        fast = y.dtype == torch.float32 and y.device.type == "cpu"
        # Torch's own casts are exact here; elsewhere a device may lack the dtype or have its own view of saturation.
        if fast and (host := self._host) is not None:
            return self._encode_by_cast(y, *host)
        nan = nan_mask(y)
        if nan is not None and not self.has_nan:
            raise SpecError(self._no_nan)
        if fast and self.flavour == "finite" and self.exponent < 5 and self.mantissa > 0:
            return self._encode_by_half(y.detach())
        codes = self._encode_by_steps(y)
        return codes if nan is None else codes.masked_fill_(nan, self._nan_code)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of `codes` (uint8, below 2^bits, any shape): float32, in its shape."""
        if codes.device.type == "cpu" and self._fits_half and not self._is_nan_of_e4m3(codes):
            return self._decode_by_half(codes)
        table = _values(self, codes.device)
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

    def round(self, y: Tensor) -> Tensor:
        """The value nearest to each entry of `y` (float32 or float64): its dtype, as `decode(encode(y))`; nan stays.

        Negative values that round to zero may become +0.
        """
        require_float(y, self)
        if self.mantissa == 0:
            values = self.decode(self._encode_by_steps(y)).to(y.dtype)
            nan = nan_mask(y)
            return values if nan is None else values.masked_fill_(nan, math.nan)
        integer, fraction, bias = FLOAT_LAYOUT[y.dtype]
        values = y.clamp(-self.largest, self.largest)
        infinity = (2 * bias + 1) << fraction
        binade = values.view(integer).bitwise_and(infinity).clamp_(min=(self._emin + bias) << fraction).view(y.dtype)
        # Next to this the spacing of floats is that of the element's values, so the addition itself rounds.
        reach = 1.5 * 2.0 ** (fraction - self.mantissa)
        return values.add_(binade, alpha=reach).sub_(binade, alpha=reach)

    @property
    def _is_fp8(self) -> bool:
        return (self.exponent, self.mantissa) in ((4, 3), (5, 2))

    @property
    def _emin(self) -> int:
        """The exponent of the least normal value, and of the subnormals."""
        return 1 - self.bias

    @property
    def _sign(self) -> int:
        """The sign bit of a code."""
        return 1 << (self.bits - 1)

    @property
    def _finite_codes(self) -> int:
        """Codes with a clear sign bit that are finite: those from 0 on."""
        return self._sign if self.flavour != "ocp" else {4: 0x7F, 5: 0x7C}[self.exponent]

    @property
    def _nan_code(self) -> int:
        return self._sign if self.flavour == "fnuz" else 0x7F

    @property
    def _no_nan(self) -> str:
        return f"{self} has no nan, and the values to encode hold one; find its source, or use e4m3fn, which has"

    @functools.cached_property
    def _host(self) -> tuple[torch.dtype, float] | None:
        """A torch dtype with this mantissa and no fewer exponents, and what to multiply by so that patterns agree."""
        own = _TORCH_DTYPES.get((self.exponent, self.mantissa, self.flavour))
        if own is not None:
            return own, 1.0
        if self.flavour == "finite" and self.bits < 8:
            if self.mantissa == 3:
                return torch.float8_e4m3fn, 2.0 ** (self.bias - 7)
            if self.mantissa == 2:
                return torch.float8_e5m2, 2.0 ** (self.bias - 15)
        return None

    def _encode_by_cast(self, y: Tensor, host: torch.dtype, ratio: float) -> Tensor:
        limit = self.largest * ratio
        scaled = y.clamp(-limit, limit) if ratio == 1.0 else (y * ratio).clamp_(-limit, limit)
        codes = scaled.to(host).view(torch.int8)
        if self.bits < 8:
            # Moves the sign from bit 7 to its place; a nan of the host ends up above every code.
            codes.add_(codes >> 7, alpha=128 - self._sign)
            if codes.numel() and int(codes.view(torch.uint8).amax()) >> self.bits:
                raise SpecError(self._no_nan)
        return codes.view(torch.uint8)

    def _encode_by_half(self, y: Tensor) -> Tensor:
        ratio = 2.0 ** (self.bias - 15)  # makes subnormals of the element subnormals of float16
        spare = 10 - self.mantissa
        magnitude = y.abs()
        # Veltkamp's splitting keeps the leading bits, ties to even; from the clamped side on it keeps subnormals' bits.
        split = magnitude.clamp(2.0**self._emin, self.largest).mul_(ratio * (2.0 ** (23 - self.mantissa) + 1))
        torch.sub(split, magnitude, alpha=ratio, out=magnitude)
        patterns = split.sub_(magnitude).half().view(torch.int16)
        patterns.clamp_(max=(self._sign - 1) << spare).bitwise_right_shift_(spare)
        negative = y.half().view(torch.int16).bitwise_right_shift_(15)
        return patterns.add_(negative, alpha=-self._sign).to(torch.uint8)

    def _encode_by_steps(self, y: Tensor) -> Tensor:
        codes = _staircase(self)(y).to(torch.uint8)
        return codes.masked_fill_(codes == self._sign, 0) if self.flavour == "fnuz" else codes

    @property
    def _fits_half(self) -> bool:
        """Whether a code, shifted, is the pattern of a float16 that differs from its value by a power of two."""
        return self.flavour == "ocp" or (self.flavour == "finite" and self.exponent < 5)

    def _is_nan_of_e4m3(self, codes: Tensor) -> bool:
        """Whether e4m3fn codes hold a nan, which float16 would take for a number."""
        if self.flavour != "ocp" or self.exponent != 4 or not codes.numel():
            return False
        return int(codes.amax()) == 0xFF or int(codes.view(torch.int8).amax()) == 0x7F

    def _decode_by_half(self, codes: Tensor) -> Tensor:
        patterns = codes.to(torch.int16).mul_(1 << (16 - self.bits))
        if self.exponent < 5:
            magnitude = (self._sign - 1) << (10 - self.mantissa)
            patterns.bitwise_right_shift_(5 - self.exponent).bitwise_and_(-0x8000 | magnitude)
        values = patterns.view(torch.float16).to(torch.float32)
        return values if self.bias == 15 else values.mul_(2.0 ** (15 - self.bias))


def parse_float(word: str) -> FloatElement | None:
    """The float that `word` names (`e2m1`, `e4m3fn` or `e4m3`, `e5m2`, `e4m3fnuz`, `e5m2(plain)`, …).

    None where the word has not that form; SpecError where it has and there is no such float.
    """
    match = re.fullmatch(r"e(\d+)m(\d+)(fn|fnuz|\(plain\))?", word, re.ASCII)
    if match is None:
        return None
    exponent, mantissa, suffix = int(match[1]), int(match[2]), match[3]
    if suffix == "fnuz":
        return FloatElement(exponent, mantissa, "fnuz")
    element = FloatElement(exponent, mantissa, "finite")
    if suffix == "(plain)":
        return element
    if suffix == "fn" and (exponent, mantissa) != (4, 3):
        raise SpecError(f"there is no {word}, for fn tells one e4m3 from others; write {word.removesuffix('fn')}")
    return FloatElement(exponent, mantissa, "ocp") if (exponent, mantissa) in ((4, 3), (5, 2)) else element


def _magnitude(element: FloatElement, code: int) -> float:
    """The value of a finite code with a clear sign bit."""
    field, mantissa = divmod(code, 1 << element.mantissa)
    if field:
        mantissa += 1 << element.mantissa
    return math.ldexp(mantissa, max(field, 1) - element.bias - element.mantissa)


@functools.lru_cache(maxsize=256)
def _values(element: FloatElement, device: torch.device) -> Tensor:
    """The value of every code, float32."""
    finite, sign = element._finite_codes, element._sign
    values = [_magnitude(element, code) for code in range(finite)] + [math.nan] * (sign - finite)
    if element.flavour == "ocp" and element.exponent == 5:
        values[finite] = math.inf
    values += [-value for value in values]
    if element.flavour == "fnuz":
        values[sign] = math.nan
    with torch.inference_mode(False):  # kept for later calls, which may be of another mode
        return torch.tensor(values, dtype=torch.float32, device=device)


@functools.lru_cache(maxsize=64)
def _staircase(element: FloatElement) -> Staircase:
    """Codes as a step function: the tie between codes k and k + 1 goes to the even one."""
    values = [_magnitude(element, code) for code in range(element._finite_codes)]
    steps = tuple(((a + b) / 2, bool(code % 2)) for code, (a, b) in enumerate(itertools.pairwise(values)))
    return Staircase(steps, steps, (0, element._sign))
