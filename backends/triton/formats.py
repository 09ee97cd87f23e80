"""`WeightFormat`: how the codes of a weight [N, K] lie in a bundle and what they stand for, as one printed line.

    value[n, k] = (code[n, k] - offset - zero[g, n]) * step[g, n]            for integers
    value[n, k] = element(code[n, k]) * step[g, n]                           for floats and codebooks

Codes are int32 words in the order of `pack.TileOrder`, filled with zeros up to a whole run of `block_k`; `step` comes
from scales [G, N / rows], g counting groups along K.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton.pack import TileOrder
from qcompile.errors import SpecError
from qcompile.numerics.element import Element, FloatElement, IntElement
from qcompile.numerics.scale_type import DoubleScale, E4M3Scale, E8M0Scale, FloatScale, Pow2Scale
from qcompile.numerics.spec import QuantSpec

MAX_BLOCK_K, MIN_BLOCK_K = 64, 16
"""Codes along K that one step of a kernel unpacks: 64 keeps an fp16 tile of 128 x 64 activations at 16 KB; tensor
cores multiply no fewer than 16."""


@dataclass(frozen=True)
class WeightFormat:
    """Everything a kernel needs to know of a packed weight but its number of outputs; prints and parses.

    - `element`: as a spec names it (`int4`, `e2m1`, `nf4`); `bits`: of a stored code, more where planes do not fit.
    - `k`: codes of a row; `group`: codes along K that share a scale, 0 for the whole row.
    - `rows`: outputs that share a scale, 0 for all of them.
    - `zero`: `none`, `int` or `float`, as stored.  `scale`: `float`, `e8m0` or `e4m3`.
    - `outer`: whether a scale is divided by the tensor's global one.  `times`: what every step is multiplied by.
    - `layout`: `tile` (see `pack`), or `rows`: 8-bit codes as they are, [N, K], for 8-bit tensor cores.

    >>> str(WeightFormat("int4", 4, 256, 64, 128))
    'int4 bits=4 k=256 block_k=64 group=128 rows=1 zero=none scale=float outer=0 times=1.0 layout=tile'
    """

    element: str
    bits: int
    k: int
    block_k: int
    group: int = 0
    rows: int = 1
    zero: str = "none"
    scale: str = "float"
    outer: bool = False
    times: float = 1.0
    layout: str = "tile"

    def __post_init__(self) -> None:
        if self.group and self.group % self.block_k:
            raise SpecError(
                f"block_k={self.block_k} does not divide groups of {self.group}: a step of the kernel would read "
                f"one scale for codes of several groups; use a block_k that divides {self.group}"
            )

    def __str__(self) -> str:
        values = ((f.name, getattr(self, f.name)) for f in fields(self)[1:])
        return " ".join([self.element, *(f"{n}={int(v) if isinstance(v, bool) else v}" for n, v in values)])

    @classmethod
    def parse(cls, text: str) -> WeightFormat:
        """The inverse of `str`. Raises SpecError where a field is missing or unknown."""
        return _parse(text)

    @property
    def order(self) -> TileOrder:
        """How the codes are packed."""
        return TileOrder(self.bits, self.spec_element.storage == torch.int8, self.block_k)

    @property
    def spec_element(self) -> Element:
        """The element of the spec."""
        return element_of(self.element)

    @property
    def padded(self) -> int:
        """K rounded up to whole runs."""
        return -(-self.k // self.block_k) * self.block_k

    @property
    def runs(self) -> int:
        """Steps of a kernel along K."""
        return self.padded // self.block_k

    @property
    def groups(self) -> int:
        """Scales of an output along K."""
        return self.k // self.group if self.group else 1

    @property
    def integer(self) -> bool:
        """Whether codes are integers."""
        return isinstance(self.spec_element, IntElement)

    @property
    def offset(self) -> int:
        """What packing added to the codes: half their range where they are signed."""
        return 1 << (self.bits - 1) if self.order.signed else 0

    @property
    def half_float(self) -> tuple[int, int] | None:
        """(mantissa bits, log2 of the factor) that make an fp16 of a code by a shift; None where that cannot be."""
        element = self.spec_element
        if not isinstance(element, FloatElement) or element.exponent > 5 or element.mantissa_bits > 10:
            return None
        return element.mantissa_bits, 15 - element.bias

    def values(self, codes: Tensor) -> Tensor:
        """What codes stand for before zero-point and step, float32."""
        element = self.spec_element
        return codes.to(torch.float32) if isinstance(element, IntElement) else element.decode(codes)

    def numbers(self, planes: Sequence[Tensor]) -> Tensor:
        """`values` of packed codes, [N, k], by plain shifts, as a compiler can trace them."""
        if self.layout == "rows":
            return self.values(planes[0][:, : self.k])
        stored, start = torch.zeros((), dtype=torch.int32, device=planes[0].device), 0
        for plane, width in zip(planes, self.order.widths, strict=True):
            words = plane.reshape(self.runs, 1, -1, plane.shape[1])
            shifts = torch.arange(0, 32, width, dtype=torch.int32, device=plane.device)[:, None, None]
            fields = (words >> shifts) & ((1 << width) - 1)
            stored = stored | (fields.reshape(self.padded, -1) << start)
            start += width
        codes = stored[: self.k].t()
        return (codes - self.offset).to(torch.float32) if self.integer else self.values(codes.to(torch.uint8))

    def pack(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes [N, k] as the planes of `TileOrder`, with zeros behind the last of a row."""
        if codes.shape[1] != self.k:
            raise SpecError(f"codes of shape {list(codes.shape)} for rows of {self.k}; pass the weight [N, K]")
        padded = torch.nn.functional.pad(codes, (0, self.padded - self.k))
        return (padded,) if self.layout == "rows" else self.order.pack(padded)

    def unpack(self, planes: list[Tensor]) -> Tensor:
        """The codes [N, k] that `pack` was given."""
        whole = planes[0] if self.layout == "rows" else self.order.unpack(planes)
        return whole[:, : self.k].contiguous()

    def plane_shapes(self, outputs: int) -> list[tuple[tuple[int, int], torch.dtype]]:
        """Shape and dtype of every plane of a weight with so many outputs."""
        if self.layout == "rows":
            return [((outputs, self.padded), torch.int8 if self.order.signed else torch.uint8)]
        return [((self.padded * width // 32, outputs), torch.int32) for width in self.order.widths]

    @property
    def output_axis(self) -> int:
        """The axis of a plane that outputs lie along."""
        return 0 if self.layout == "rows" else 1


@lru_cache(maxsize=1024)
def _parse(text: str) -> WeightFormat:
    element, *words = text.split()
    kinds = {f.name: str(f.type) for f in fields(WeightFormat)[1:]}
    given = dict(word.partition("=")[::2] for word in words)
    if set(given) != set(kinds):
        raise SpecError(f"weight format {text!r} does not have exactly the fields {', '.join(kinds)}")
    read: dict[str, Callable[[str], Any]] = {"int": int, "float": float, "bool": lambda v: bool(int(v)), "str": str}
    return WeightFormat(element, **{name: read[kinds[name]](value) for name, value in given.items()})


@lru_cache(maxsize=64)
def element_of(word: str) -> Element:
    """The element that a format names."""
    return QuantSpec.parse(word if re.fullmatch(r"u?int\d|ternary|nf4|fp4", word) else f"{word} channel").element


def format_of(spec: QuantSpec, shape: tuple[int, ...], scale_shape: tuple[int, ...]) -> WeightFormat | str:
    """The format of a weight [N, K] of `spec`, or why the kernels have none."""
    (outputs, inputs), (rows, columns) = shape, scale_shape
    if spec.via is not None:
        return f"values are rounded to {spec.via} behind their scale, which no kernel does"
    if spec.when == "no_scale":
        return "a cast without scales is read as it is"
    if isinstance(spec.zero, DoubleScale) or isinstance(spec.scale, DoubleScale):
        return "parameters that are quantized themselves are read by no kernel"
    if not isinstance(spec.scale, FloatScale | Pow2Scale | E8M0Scale | E4M3Scale):
        return f"{spec.scale} scales are read by no kernel"
    group = 0 if columns == 1 else inputs // columns
    block = block_of(group or MAX_BLOCK_K)
    if block is None:
        return f"groups of {group} are smaller than a tensor core's step; use groups of a multiple of {MIN_BLOCK_K}"
    element = spec.element
    fraction = element.fraction if isinstance(element, IntElement) else 0
    named = f"int{spec.bits}" if fraction else str(element)
    times = 2.0**-fraction
    if isinstance(spec.scale, E8M0Scale) and spec.scale.rule == "noclip":
        times *= 2.0 ** (element.emax + 1) / element.largest
    kind = "e8m0" if isinstance(spec.scale, E8M0Scale) else "e4m3" if isinstance(spec.scale, E4M3Scale) else "float"
    outer = isinstance(spec.scale, E4M3Scale) and spec.scale.shared
    bits = _stored_bits(spec.bits, block)
    share = 0 if rows == 1 and outputs > 1 else outputs // rows
    return WeightFormat(named, bits, inputs, block, group, share, str(spec.zero), kind, outer, times)


def block_of(group: int) -> int | None:
    """The largest power of two, at most MAX_BLOCK_K, that divides a group; None under MIN_BLOCK_K.

    >>> [block_of(group) for group in (128, 96, 32, 16, 8)]
    [64, 32, 32, 16, None]
    """
    block = min(MAX_BLOCK_K, group & -group)
    return block if block >= MIN_BLOCK_K else None


def _stored_bits(bits: int, block: int) -> int:
    """Bits of a stored code: those of the code where its planes, two at most, fill whole words of a run.

    >>> [_stored_bits(bits, 64) for bits in range(1, 9)], _stored_bits(3, 16)
    ([1, 2, 3, 4, 5, 6, 8, 8], 4)
    """
    for stored in range(bits, 9):
        widths = TileOrder(stored, False, 256).widths
        if len(widths) <= 2 and block * widths[-1] % 32 == 0:
            return stored
    raise SpecError(f"codes of {bits} bits fill no whole words of a run of {block}")
