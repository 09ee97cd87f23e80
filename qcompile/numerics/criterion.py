"""How the clipping range of a group is chosen: the `observer` part of a spec."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TypeAlias

from qcompile.errors import SpecError, nearest


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
    """The range with the least sum of |x - dequantized| ** norm in its group, searched for among shrunk and grown ones.

    `golden`: by golden-section search, else over a grid. Where scales are coarse (powers of two, e4m3) the grid is the
    scales that exist around the first one.
    """

    norm: float = 2.0
    golden: bool = False

    def __post_init__(self) -> None:
        if not (self.norm > 0 and math.isfinite(self.norm)):
            raise SpecError(f"{self._word}={self.norm:g} is not a positive exponent; use mse (which is 2) or mse=2.4")

    @property
    def _word(self) -> str:
        return "golden" if self.golden else "mse"

    def __str__(self) -> str:
        return self._word if self.norm == 2 else f"{self._word}={self.norm!r}"


@dataclass(frozen=True)
class HalfQuadratic:
    """Zero-point (`asym`) or scale (`sym`) by half-quadratic splitting, for weights; see `qcompile.numerics.hqo`."""

    def __str__(self) -> str:
        return "hqo"


Criterion: TypeAlias = AbsMax | MinMax | Percentile | LeastError | HalfQuadratic

_DEFAULTS: dict[str, Criterion] = {
    "absmax": AbsMax(),
    "minmax": MinMax(),
    "percentile": Percentile(),
    "mse": LeastError(),
    "golden": LeastError(golden=True),
    "hqo": HalfQuadratic(),
}
CRITERIA = tuple(_DEFAULTS)


def parse_criterion(text: str) -> Criterion:
    """Read `absmax`, `minmax`, `percentile[=99.9]`, `mse[=2.4]`, `golden[=2.4]` or `hqo`; SpecError for other words."""
    word, equals, value = text.partition("=")
    if word not in CRITERIA:
        raise SpecError(f"unknown observer {text!r}{nearest(word, CRITERIA)}; observers are {', '.join(CRITERIA)}")
    if not equals:
        return _DEFAULTS[word]
    if word in ("absmax", "minmax", "hqo"):
        raise SpecError(f"observer {word} takes no value, got {text!r}; write {word}")
    try:
        number = float(value)
    except ValueError as error:
        raise SpecError(f"observer {text!r} needs a number after '='; write {word} or {word}=2.5") from error
    return Percentile(number) if word == "percentile" else LeastError(number, word == "golden")
