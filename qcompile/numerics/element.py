"""What one code is: the element types a quantized tensor can be made of."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias

import torch

from qcompile.errors import SpecError


@dataclass(frozen=True)
class IntElement:
    """An integer of `bits` bits, 1 to 8; `ternary` is the signed two-bit integer that leaves -2 out.

    Codes are held one per byte, int8 where signed, uint8 otherwise; packing belongs to backends.
    """

    bits: int
    signed: bool = True
    ternary: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"integer elements have 1 to 8 bits, not {self.bits}; use int1 to int8 or uint1 to uint8")
        if self.ternary and (self.bits != 2 or not self.signed):
            raise SpecError(f"ternary is signed and has 2 bits, not {self}; use ternary or int{self.bits}")

    def __str__(self) -> str:
        return "ternary" if self.ternary else f"{'' if self.signed else 'u'}int{self.bits}"

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

    def with_bits(self, bits: int) -> IntElement:
        """The same kind of integer at another width."""
        if self.ternary:
            raise SpecError(f"ternary has no other width, so bits={bits} does not apply; set element=int{bits} instead")
        return IntElement(bits, self.signed)


Element: TypeAlias = IntElement
"""Every kind of element; a kind joins by becoming part of this union and listing its words in `ELEMENTS`."""

_INTEGERS = [IntElement(bits, signed) for signed in (True, False) for bits in range(1, 9)]
ELEMENTS: dict[str, Element] = {str(e): e for e in [*_INTEGERS, IntElement(2, ternary=True)]}


def parse_element(word: str) -> Element:
    """The element that `word` names; SpecError lists the known ones."""
    if word not in ELEMENTS:
        raise SpecError(f"unknown element {word!r}{nearest(word, ELEMENTS)}; elements are {', '.join(ELEMENTS)}")
    return ELEMENTS[word]


def nearest(word: str, valid: Iterable[str]) -> str:
    """` (did you mean '…'?)` where some valid word is close to `word`, else the empty string."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
