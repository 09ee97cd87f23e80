"""What one code is: the element types a quantized tensor can be made of."""

from __future__ import annotations

from typing import TypeAlias

from qcompile.errors import SpecError, nearest
from qcompile.numerics.codebook import CODEBOOKS, Codebook
from qcompile.numerics.float_element import FloatElement, parse_float
from qcompile.numerics.int_element import IntElement, parse_int

__all__ = ["ELEMENTS", "Codebook", "Element", "FloatElement", "IntElement", "parse_element"]

Element: TypeAlias = IntElement | FloatElement | Codebook
"""Every kind of element; a kind joins by becoming part of this union and of `parse_element`."""

ELEMENTS = (
    *(f"{u}int{bits}" for u in ("", "u") for bits in range(1, 9)),
    *("ternary", "e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e2m1", "e2m3", "e3m2"),
    *CODEBOOKS,
)
"""The common words. Any eXmY that fits eight bits is an element, too, as are `e4m3(plain)` and fixed-point `int8.6`."""


def parse_element(word: str) -> Element:
    """The element that `word` names; SpecError lists the known ones."""
    element: Element | None = parse_int(word)
    if element is None:
        element = Codebook(word) if word in CODEBOOKS else parse_float(word)
    if element is None:
        known = ", ".join(ELEMENTS)
        raise SpecError(f"unknown element {word!r}{nearest(word, ELEMENTS)}; elements are {known}, or any eXmY")
    return element
