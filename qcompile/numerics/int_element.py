"""Integers as elements of a quantized tensor."""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch

from qcompile.errors import SpecError


@dataclass(frozen=True)
class IntElement:
    """An integer of `bits` bits, 1 to 8, worth code * 2^-`fraction`.

    `ternary` is the signed two-bit integer that leaves -2 out. Codes are held one per byte, int8 where signed, uint8
    otherwise; packing belongs to backends.
    """

    bits: int
    signed: bool = True
    ternary: bool = False
    fraction: int = 0

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"integer elements have 1 to 8 bits, not {self.bits}; use int1 to int8 or uint1 to uint8")
        if self.ternary and (self.bits != 2 or not self.signed or self.fraction):
            raise SpecError(f"ternary is signed and has 2 bits, not {self}; use ternary or int{self.bits}")
        if not 0 <= self.fraction < self.bits:
            raise SpecError(f"int{self.bits}.{self.fraction} has no such fraction; use 0 to {self.bits - 1} bits of it")

    def __str__(self) -> str:
        if self.ternary:
            return "ternary"
        return f"{'' if self.signed else 'u'}int{self.bits}" + (f".{self.fraction}" if self.fraction else "")

    @property
    def lowest(self) -> int:
        """The lowest code of the full range."""
        return (-1 if self.ternary else -(1 << (self.bits - 1))) if self.signed else 0

    @property
    def highest(self) -> int:
        """The highest code."""
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds one code."""
        return torch.int8 if self.signed else torch.uint8

    @property
    def largest(self) -> float:
        """The greatest value of a code."""
        return self.highest * 2.0**-self.fraction

    @property
    def emax(self) -> int:
        """The exponent of the greatest power of two that is not above `largest`."""
        return self.highest.bit_length() - 1 - self.fraction

    @property
    def mantissa_bits(self) -> int:
        """Bits after the leading one of the highest code."""
        return max(0, self.highest.bit_length() - 1)

    @property
    def has_nan(self) -> bool:
        """Whether a code stands for nan: none does."""
        return False

    def with_bits(self, bits: int) -> IntElement:
        """The same kind of integer at another width."""
        if self.ternary:
            raise SpecError(f"ternary has no other width, so bits={bits} does not apply; set element=int{bits} instead")
        return IntElement(bits, self.signed, fraction=self.fraction)


def parse_int(word: str) -> IntElement | None:
    """`int1` to `int8`, `uint1` to `uint8`, `ternary`, or a fixed-point `int8.6`; None for a word of another form."""
    if word == "ternary":
        return IntElement(2, ternary=True)
    found = re.fullmatch(r"(u?)int(\d+)(?:\.(\d+))?", word)
    return None if found is None else IntElement(int(found[2]), not found[1], fraction=int(found[3] or 0))
