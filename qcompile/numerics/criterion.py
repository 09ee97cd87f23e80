"""How the clipping range of a group is chosen: the `observer` part of a spec."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from qcompile.errors import SpecError
from qcompile.numerics.element import nearest


@dataclass(frozen=True)
class AbsMax:
    """The largest magnitude; nothing clips but what the range convention clips. For `sym`."""

    def __str__(self) -> str:
        return "absmax"


@dataclass(frozen=True)
class MinMax:
    """The smallest and largest entry, widened to hold 0. For `asym`."""

    def __str__(self) -> str:
        return "minmax"


@dataclass(frozen=True)
class Percentile:
    """`sym`: the `percent`-th percentile of |x|; `asym`: the (100 - percent)-th and percent-th of x.

    Linear between the two nearest ranks.
    """

    percent: float = 99.999

    def __post_init__(self) -> None:
        if not 50 < self.percent <= 100:
            raise SpecError(f"percentile={self.percent:g} is not in (50, 100]; write a percentage, as percentile=99.99")

    def __str__(self) -> str:
        return f"percentile={self.percent!r}"


@dataclass(frozen=True)
class LeastError:
    """The range, of a grid of shrunk and grown ones, with the least sum of |x - dequantized| ** norm in its group."""

    norm: float = 2.0

    def __post_init__(self) -> None:
        if not (self.norm > 0 and math.isfinite(self.norm)):
            raise SpecError(f"mse={self.norm:g} is not a positive exponent; use mse (which is 2) or mse=2.4")

    def __str__(self) -> str:
        return "mse" if self.norm == 2 else f"mse={self.norm!r}"


Criterion: TypeAlias = AbsMax | MinMax | Percentile | LeastError

CRITERIA = ("absmax", "minmax", "percentile", "mse")


def parse_criterion(text: str) -> Criterion:
    """Read `absmax`, `minmax`, `percentile[=99.9]` or `mse[=2.4]`; SpecError names the nearest word."""
    word, equals, value = text.partition("=")
    if word not in CRITERIA:
        raise SpecError(f"unknown observer {text!r}{nearest(word, CRITERIA)}; observers are {', '.join(CRITERIA)}")
    if not equals:
        defaults: dict[str, Criterion] = {
            "absmax": AbsMax(),
            "minmax": MinMax(),
            "percentile": Percentile(),
            "mse": LeastError(),
        }
        return defaults[word]
    if word in ("absmax", "minmax"):
        raise SpecError(f"observer {word} takes no value, got {text!r}; write {word}")
    try:
        number = float(value)
    except ValueError as error:
        raise SpecError(f"observer {text!r} needs a number after '='; write {word} or {word}=2.5") from error
    return Percentile(number) if word == "percentile" else LeastError(number)
