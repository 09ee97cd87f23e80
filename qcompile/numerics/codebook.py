"""Elements whose values stand in a table: nf4 and fp4, as bitsandbytes has them."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.staircase import Staircase, Step, nan_mask, require_float


@dataclass(frozen=True)
class _Book:
    """The values, by code; and for either sign the codes met from zero outwards, and the step from each to the next."""

    values: tuple[float, ...]
    positive: tuple[int, ...]
    positive_steps: tuple[Step, ...]
    negative: tuple[int, ...]
    negative_steps: tuple[Step, ...]


def _ascending(values: tuple[float, ...]) -> _Book:
    """Codes in the order of their values, 0.0 among them; a value at a float32 midpoint takes the lower neighbour."""
    zero, last = values.index(0.0), len(values)
    midpoints = [(a + b) / 2 for a, b in itertools.pairwise(values)]
    return _Book(
        values,
        positive=tuple(range(zero, last)),
        positive_steps=tuple((at, False) for at in midpoints[zero:]),
        negative=tuple(range(zero, -1, -1)),
        negative_steps=tuple((-at, True) for at in reversed(midpoints[:zero])),
    )


def _signed(magnitudes: tuple[float, ...], thresholds: tuple[float, ...]) -> _Book:
    """Codes of a sign bit above a magnitude's; `thresholds` part the magnitudes, and belong to the smaller one.

    0.0 and -0.0 have code 0; negative values that round to zero have the sign bit alone.
    """
    sign = len(magnitudes)
    outwards = tuple(sorted(range(sign), key=magnitudes.__getitem__))
    steps = tuple((at, False) for at in thresholds)
    return _Book(
        values=(*magnitudes, *(-magnitude for magnitude in magnitudes)),
        positive=outwards,
        positive_steps=steps,
        negative=(outwards[0], *(sign + code for code in outwards)),
        negative_steps=((0.0, False), *steps),
    )


# Values: QLoRA (arXiv 2305.14314), appendix E, in bitsandbytes' digits; its thresholds are the midpoints in float32.
_NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)
# Both from bitsandbytes' kernels. The thresholds are the midpoints as published, 14 float32 steps off at most.
_FP4 = (0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25)
_FP4_THRESHOLDS = (0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333)

CODEBOOKS = {"nf4": _ascending(_NF4), "fp4": _signed(_FP4, _FP4_THRESHOLDS)}
"""Every codebook by name; 2^b values of magnitude 1 at most, 0.0 among them. One more entry is one more element."""


@dataclass(frozen=True)
class Codebook:
    """An element that is a place in a table of values between -1 and 1. Codes are uint8, as bitsandbytes numbers them.

    - `nf4`: the 16 values of QLoRA (arXiv 2305.14314), ascending. A value at a midpoint takes the lower value.
    - `fp4`: a sign bit above three bits that tell 0, 1/192, 1/6, 1/4, 1/3, 1/2, 2/3, 1 apart; parted by the published
      thresholds, each of which belongs to the smaller magnitude. -0.0 has code 0; code 8 is negative zero.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in CODEBOOKS:
            raise SpecError(f"unknown codebook {self.name!r}; use {' or '.join(CODEBOOKS)}")

    def __str__(self) -> str:
        return self.name

    @property
    def bits(self) -> int:
        """Bits of one code."""
        return (len(CODEBOOKS[self.name].values) - 1).bit_length()

    @property
    def storage(self) -> torch.dtype:
        """The torch dtype that holds one code."""
        return torch.uint8

    @property
    def mantissa_bits(self) -> int:
        """0: a codebook has no mantissa."""
        return 0

    @property
    def has_nan(self) -> bool:
        """False: every code is a number."""
        return False

    @property
    def largest(self) -> float:
        """The greatest magnitude."""
        return max(abs(value) for value in CODEBOOKS[self.name].values)

    @property
    def emax(self) -> int:
        """floor(log2(largest))."""
        return math.frexp(self.largest)[1] - 1

    @property
    def values(self) -> Tensor:
        """The value of every code, in order: float32, [2^bits]. Shared, so do not write to it."""
        return _tables(self.name, torch.device("cpu"))[0]

    def with_bits(self, bits: int) -> Codebook:
        """This element, where `bits` is its width; SpecError otherwise."""
        if bits != self.bits:
            raise SpecError(
                f"{self} has {self.bits} bits, so bits={bits} does not apply; set element=int{bits} instead"
            )
        return self

    def encode(self, y: Tensor) -> Tensor:
        """Codes of the values nearest to `y` (float32 or float64, any shape): uint8, in its shape.

        Thresholds are float32 values, compared with exactly; the class says who owns them. Magnitudes over `largest`,
        infinities included, take the outermost values. Raises SpecError for a nan and for other dtypes.
        """
        require_float(y, self)
        if nan_mask(y) is not None:
            raise SpecError(f"{self} has no nan, and the values to encode hold one; find its source")
        return self._by_level(y, 1)

    def decode(self, codes: Tensor) -> Tensor:
        """The values of `codes` (uint8, below 2^bits, any shape): float32, in its shape."""
        table = _tables(self.name, codes.device)[0]
        return table.index_select(0, codes.reshape(-1).to(torch.int32)).view(codes.shape)

    def round(self, y: Tensor) -> Tensor:
        """The value nearest to each entry of `y` (float32 or float64): its dtype, as `decode(encode(y))`; nan stays."""
        require_float(y, self)
        values = self._by_level(y, 2).to(y.dtype)
        nan = nan_mask(y)
        return values if nan is None else values.masked_fill_(nan, math.nan)

    def _by_level(self, y: Tensor, table: int) -> Tensor:
        """What a table of `_tables` holds at the level of each entry of `y`."""
        levels = _staircase(self.name)(y)
        return _tables(self.name, y.device)[table].index_select(0, levels.view(-1)).view(y.shape)


@functools.lru_cache(maxsize=16)
def _staircase(name: str) -> Staircase:
    """Levels: from 0 on those of the positive codes, then those of the negative ones."""
    book = CODEBOOKS[name]
    return Staircase(book.positive_steps, book.negative_steps, (0, len(book.positive)))


@functools.lru_cache(maxsize=64)
def _tables(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Values by code (float32), codes by level (uint8), values by level (float32)."""
    book = CODEBOOKS[name]
    by_level = [*book.positive, *book.negative]
    with torch.inference_mode(False):  # kept for later calls, which may be of another mode
        values = torch.tensor(book.values, dtype=torch.float32, device=device)
        codes = torch.tensor(by_level, dtype=torch.uint8, device=device)
        return values, codes, values[codes.long()]
