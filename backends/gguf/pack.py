"""GGUF's block types, bit for bit as ggml reads them (ggml-common.h, ggml-quants.c; python: `gguf.quants`).

A row is a run of blocks; a block holds the codes of its 32, 64 or 256 values with their scales. Which of our specs a
type is the exact home of is said by `home`:

    type    bits a value   codes         scales                                    exact home of
    Q4_0    4.5            -8…7          f16 per 32                                int1…int4 sym group=32 scale=f16
    Q5_0    5.5            -16…15        f16 per 32                                int5 sym group=32 scale=f16
    Q8_0    8.5            -128…127      f16 per 32                                int6…int8 sym group=32 scale=f16
    Q4_1    5              0…15          f16 scale and offset per 32               uint1…uint4 sym group=32 scale=f16
    Q5_1    6              0…31          f16 scale and offset per 32               uint5 sym group=32 scale=f16
    TQ1_0   1.6875         -1…1          f16 per 256                               ternary group=256 scale=f16
    TQ2_0   2.0625         -1…1          f16 per 256                               (the same, read faster)
    MXFP4   4.25           e2m1          e8m0 per 32                               mxfp4, any rule but noclip
    NVFP4   4.5            e2m1          e4m3 per 16; the global scale elsewhere   nvfp4
    Q2_K    2.625          0…3           4-bit scale and offset per 16, f16 pair   –
    Q3_K    3.4375         -4…3          6-bit scale per 16, f16 per 256           –
    Q4_K    4.5            0…15          6-bit scale and offset per 32, f16 pair   –
    Q5_K    5.5            0…31          6-bit scale and offset per 32, f16 pair   –
    Q6_K    6.5625         -32…31        8-bit scale per 16, f16 per 256           –

A group that is a multiple of the block fits as well: its f16 scale is repeated. An asym spec has no exact home: a type
with offsets holds zero_point * scale rounded to f16. It is packed where that product happens to be one, and refused
where it is not. Neither has one that quantizes its scales (`double=8x16`): its outer step is a float32, a K type's f16.

`gguf.quants.quantize` (0.19) finds the same scales as our `int4 sym`, `int5 sym` and `int8 sym narrow`, group=32
scale=f16, but divides by the scale before it is rounded to f16, so that of Gaussian weights 0.05% (Q4_0), 0.09% (Q5_0)
and 0.75% (Q8_0) of the codes are one off; it rounds halves up (away from 0 for Q8_0), which decided none of them. The
nearest code at the stored scale is ours: 0.000, 0.000 and 0.006 dB better. TQ2_0: 0.006%. Its Q4_1 and Q5_1 differ from
our asym in 23% of the codes and are 0.28 dB better, for they take the minimum as it is, where an integer zero-point
moves the whole grid.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

import torch
from torch import Tensor

from qcompile.backends.gguf.fields import Bits, Field, Half, SixBits, Trits
from qcompile.errors import SpecError
from qcompile.numerics.granularity import PerGroup
from qcompile.numerics.packing import check_codes
from qcompile.numerics.scale_type import E4M3Scale, E8M0Scale, FloatScale
from qcompile.numerics.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class Blocks:
    """What rows of blocks hold: value = code * scale * outer_scale - offset * outer_offset.

    - `codes` `[..., n]`, int8 where the type's are signed, else uint8 (e2m1: bit patterns).
    - `scale` `[..., n / group]`: float16; int8 or uint8 where there is an `outer_scale`; float8_e8m0fnu for MXFP4,
      float8_e4m3fn for NVFP4.
    - `offset`, of the scale's shape and dtype, for types that have one, else None. It is subtracted, as our zero-points
      are: zero_point * scale.
    - `outer_scale`, `outer_offset` `[..., n / 256]`, float16, for the K types, else None.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None = None
    outer_scale: Tensor | None = None
    outer_offset: Tensor | None = None

    @classmethod
    def of(cls, codes: Tensor, scale: Tensor, zero_point: Tensor | None) -> Blocks:
        """Of what a spec without outer scales gives; `pack` refuses an offset that is no float16."""
        if zero_point is None:
            return cls(codes, scale)
        return cls(codes, scale, zero_point.to(torch.float32) * scale.to(torch.float32))


@dataclass(frozen=True)
class Integers:
    """Integers from `lowest` to `highest` that are stored as uint8 with `bias` added (modulo 256)."""

    lowest: int
    highest: int
    bias: int = 0
    dtype: torch.dtype = torch.int8

    def store(self, values: Tensor, name: str) -> Tensor:
        if values.dtype != self.dtype:
            raise SpecError(f"{name} are {values.dtype}, and {self.dtype} is what the block holds; use another type")
        values = values.view(torch.int8 if self.lowest < 0 else torch.uint8)
        check_codes(values, self.lowest, self.highest, name)
        return values.view(torch.uint8) + self.bias

    def restore(self, stored: Tensor, name: str) -> Tensor:
        values = (stored - self.bias).view(torch.int8 if self.lowest < 0 else torch.uint8)
        check_codes(values, self.lowest, self.highest, name)
        return values.view(self.dtype)


@dataclass(frozen=True)
class BlockType:
    """One of GGUF's types: `block` values in `size` bytes, a scale every `group`; `fields` in the order of the file."""

    name: str
    block: int
    group: int
    size: int
    codes: Integers
    fields: tuple[Field, ...]
    scale: Integers | None = None  # None: float16
    offset: bool = False
    outer: bool = False

    def pack(self, blocks: Blocks) -> Tensor:
        """uint8 `[..., n / block * size]`.

        A scale (and offset) of fewer groups is repeated. Raises SpecError where n is no multiple of the block, for
        codes out of range or of another dtype, and for a scale or offset that is no float16.
        """
        *rows, count = blocks.codes.shape
        if count % self.block:
            raise SpecError(
                f"rows of {count} values are not whole blocks of {self.name}, {self.block} each; leave it out"
            )
        total = blocks.codes.numel() // self.block
        numbers = {"codes": self.codes.store(blocks.codes.reshape(total, self.block), f"{self.name} codes")}
        scale = self._numbers(blocks.scale, count, "scale")
        numbers["scale"] = scale
        if self.offset:
            given = torch.zeros_like(blocks.scale) if blocks.offset is None else blocks.offset
            numbers["offset"] = self._numbers(given, count, "offset")
            if self.outer:
                numbers["both"] = torch.cat([scale, numbers["offset"]], dim=1)
        elif blocks.offset is not None:
            raise SpecError(f"{self.name} has no offset; use Q4_1 or Q5_1, or a sym spec")
        numbers |= self._outer(blocks, total)
        data = torch.cat([field.encode(numbers) for field in self.fields], dim=1)
        return data.view(*rows, count // self.block * self.size)

    def unpack(self, data: Tensor) -> Blocks:
        """What `pack` was given; SpecError where rows are not whole blocks, or hold what no block does."""
        *rows, count = data.shape
        if data.dtype != torch.uint8 or count % self.size:
            raise SpecError(
                f"{data.dtype} rows of {count} are not whole blocks of {self.name}, {self.size} bytes each; the data "
                "was cut, or is of another type"
            )
        rest = data.reshape(-1, self.size)
        numbers: dict[str, Tensor] = {}
        for field in self.fields:
            rest = rest[:, field.decode(rest, numbers) :]
        if "both" in numbers:
            numbers["scale"], numbers["offset"] = numbers["both"].chunk(2, dim=1)

        def shaped(name: str, kind: Integers | None) -> Tensor | None:
            if name not in numbers:
                return None
            found = numbers[name].contiguous()
            return (found if kind is None else kind.restore(found, f"{self.name} {name}")).reshape(*rows, -1)

        codes, scale = shaped("codes", self.codes), shaped("scale", self.scale)
        assert codes is not None
        assert scale is not None
        return Blocks(
            codes, scale, shaped("offset", self.scale), shaped("outer_scale", None), shaped("outer_offset", None)
        )

    def _numbers(self, values: Tensor, count: int, name: str) -> Tensor:
        """Scales or offsets as the fields take them: `[blocks, block / group]`."""
        groups = values.shape[-1]
        if (
            groups == 0
            or count % groups
            or count // groups % self.group
            or (self.scale and count // groups != self.group)
        ):
            raise SpecError(
                f"{self.name} has a {name} every {self.group} values, and {groups} for {count} do not fit; use "
                f"group={self.group}"
            )
        if self.scale is not None:
            values = self.scale.store(values, f"{self.name} {name}")
        elif count // groups != self.group:
            values = values.repeat_interleave(count // groups // self.group, dim=-1)
        return values.reshape(-1, self.block // self.group)

    def _outer(self, blocks: Blocks, total: int) -> dict[str, Tensor]:
        given = {"outer_scale": blocks.outer_scale, "outer_offset": blocks.outer_offset}
        found = {name: tensor.reshape(-1, 1) for name, tensor in given.items() if tensor is not None}
        needed = {"outer_scale"} | ({"outer_offset"} if self.offset else set()) if self.outer else set()
        if set(found) != needed or any(len(tensor) != total for tensor in found.values()):
            raise SpecError(
                f"{self.name} takes {' and '.join(sorted(needed)) or 'no outer scales'}, one a block of {self.block}; "
                f"given are {[f'{name} {list(tensor.shape)}' for name, tensor in found.items()] or 'none'}"
            )
        return found


def _signed(bits: int) -> Integers:
    half = 1 << (bits - 1)
    return Integers(-half, half - 1, 0 if bits == 8 else half)  # bytes are two's complement, narrower fields biased


def _unsigned(bits: int) -> Integers:
    return Integers(0, (1 << bits) - 1, dtype=torch.uint8)


_TERNARY = Integers(-1, 1, bias=1)
_E8M0 = Integers(0, 254, dtype=torch.float8_e8m0fnu)  # 255, nan, is read as 2^127
_E4M3 = Integers(0, 126, dtype=torch.float8_e4m3fn)  # 127, nan, is read as 0, and the sign is not read
_SCALE, _OFFSET = Half("scale"), Half("offset", negated=True)
_OUTER = (Half("outer_scale"), Half("outer_offset"))
_NIBBLES = Bits("codes", 32, 4, stride=16)
_FIFTHS = Bits("codes", 32, 1, start=4)


def _bits(width: int, stride: int, start: int = 0) -> Bits:
    return Bits("codes", 256, width, stride, start)


_ALL = (
    BlockType("Q4_0", 32, 32, 18, _signed(4), (_SCALE, _NIBBLES)),
    BlockType("Q4_1", 32, 32, 20, _unsigned(4), (_SCALE, _OFFSET, _NIBBLES), offset=True),
    BlockType("Q5_0", 32, 32, 22, _signed(5), (_SCALE, _FIFTHS, _NIBBLES)),
    BlockType("Q5_1", 32, 32, 24, _unsigned(5), (_SCALE, _OFFSET, _FIFTHS, _NIBBLES), offset=True),
    BlockType("Q8_0", 32, 32, 34, _signed(8), (_SCALE, Bits("codes", 32, 8))),
    BlockType(
        "Q2_K",
        256,
        16,
        84,
        _unsigned(2),
        (Bits("both", 32, 4, stride=16), _bits(2, 32), *_OUTER),
        _unsigned(4),
        offset=True,
        outer=True,
    ),
    BlockType(
        "Q3_K",
        256,
        16,
        110,
        _signed(3),
        (_bits(1, 32, 2), _bits(2, 32), Bits("scale", 16, 4, 8), Bits("scale", 16, 2, 4, 4), _OUTER[0]),
        _signed(6),
        outer=True,
    ),
    BlockType(
        "Q4_K", 256, 32, 144, _unsigned(4), (*_OUTER, SixBits(), _bits(4, 32)), _unsigned(6), offset=True, outer=True
    ),
    BlockType(
        "Q5_K",
        256,
        32,
        176,
        _unsigned(5),
        (*_OUTER, SixBits(), _bits(1, 32, 4), _bits(4, 32)),
        _unsigned(6),
        offset=True,
        outer=True,
    ),
    BlockType(
        "Q6_K",
        256,
        16,
        210,
        _signed(6),
        (_bits(4, 64), _bits(2, 32, 4), Bits("scale", 16, 8), _OUTER[0]),
        _signed(8),
        outer=True,
    ),
    BlockType("TQ1_0", 256, 256, 54, _TERNARY, (Trits(), _SCALE)),
    BlockType("TQ2_0", 256, 256, 66, _TERNARY, (_bits(2, 32), _SCALE)),
    BlockType("MXFP4", 32, 32, 17, _unsigned(4), (Bits("scale", 1, 8), _NIBBLES), _E8M0),
    BlockType("NVFP4", 64, 16, 36, _unsigned(4), (Bits("scale", 4, 8), Bits("codes", 64, 4, stride=8)), _E4M3),
)

TYPES: Mapping[str, BlockType] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every type by its name."""


def home(spec: QuantSpec) -> str | None:
    """The smallest type that holds exactly what weights of `spec` are, None where there is none.

    >>> home(QuantSpec.parse("int4 sym group=128 scale=f16"))
    'Q4_0'
    """
    if not isinstance(spec.granularity, PerGroup) or spec.granularity.axis != -1 or spec.via is not None:
        return None
    group, element = spec.granularity.size, str(spec.element)
    if element == "e2m1":
        # noclip's steps are 4/3 of a power of two.
        if isinstance(spec.scale, E8M0Scale) and spec.scale.rule != "noclip" and group == 32:
            return "MXFP4"
        return "NVFP4" if isinstance(spec.scale, E4M3Scale) and group == 16 else None
    if spec.scale != FloatScale("f16") or not spec.symmetric or group % 32:
        return None
    return "TQ1_0" if element == "ternary" and group % 256 == 0 else _INTEGERS.get(element)


_INTEGERS = {
    **{f"int{bits}": "Q4_0" if bits <= 4 else "Q5_0" if bits == 5 else "Q8_0" for bits in range(1, 9)},
    **{f"uint{bits}": "Q4_1" if bits <= 4 else "Q5_1" for bits in range(1, 6)},
    "ternary": "Q4_0",
}
