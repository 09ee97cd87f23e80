"""The pieces of a block: each turns some of a block's numbers into bytes and back.

Numbers come as a dict of tensors `[blocks, count]`: `codes`, `scale` and what else the type has. Integers are uint8
already, from 0 up; what a piece of them leaves out, another one holds.
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.packing import pack, unpack


class Field(Protocol):
    """A run of bytes that every block has at the same place."""

    def encode(self, numbers: Mapping[str, Tensor]) -> Tensor:
        """uint8 `[blocks, bytes]`."""
        ...

    def decode(self, data: Tensor, numbers: MutableMapping[str, Tensor]) -> int:
        """Put what the first bytes of `data`, uint8 `[blocks, rest of the block]`, hold into `numbers`; how many."""
        ...


@dataclass(frozen=True)
class Half:
    """One float16 a block, little-endian; `negated` where the file holds the negative."""

    source: str
    negated: bool = False

    def encode(self, numbers: Mapping[str, Tensor]) -> Tensor:
        value = numbers[self.source]
        half = value.to(torch.float16)
        wrong = half.to(torch.float64) != value.to(torch.float64)  # so is nan
        if bool(wrong.any()):
            raise SpecError(
                f"the {self.source} {float(value[wrong][0]):.9g} is no float16, which is what the block holds; use "
                "scale=f16, or another type"
            )
        return (-half if self.negated else half).contiguous().view(torch.uint8)

    def decode(self, data: Tensor, numbers: MutableMapping[str, Tensor]) -> int:
        half = data[:, :2].contiguous().view(torch.float16)
        numbers[self.source] = -half if self.negated else half
        return 2


@dataclass(frozen=True)
class Bits:
    """`width` bits, from bit `start` up, of every number of `source`, 8 / `width` numbers a byte.

    A byte takes numbers that lie `stride` apart, the first in its lowest bits; the next byte starts one number on, and
    after `stride` bytes the next run of 8 / `width` * `stride` numbers begins. `count` is how many numbers there are.
    """

    source: str
    count: int
    width: int
    stride: int = 1
    start: int = 0

    def encode(self, numbers: Mapping[str, Tensor]) -> Tensor:
        part = (numbers[self.source] >> self.start) & ((1 << self.width) - 1)
        runs = part.view(len(part), -1, 8 // self.width, self.stride).transpose(2, 3)
        return pack(runs, self.width).view(len(part), self.count * self.width // 8)

    def decode(self, data: Tensor, numbers: MutableMapping[str, Tensor]) -> int:
        size = self.count * self.width // 8
        runs = (len(data), self.count * self.width // 8 // self.stride, self.stride, 8 // self.width)
        part = unpack(data[:, :size], self.width, runs, signed=False).transpose(2, 3).reshape(len(data), self.count)
        numbers[self.source] = numbers.get(self.source, 0) | (part << self.start)
        return size


@dataclass(frozen=True)
class SixBits:
    """Eight scales and eight offsets of six bits in twelve bytes (Q4_K, Q5_K); `both` holds them, scales first.

    Bytes 0 to 3 hold scales 0 to 3 with the two high bits of scales 4 to 7 above them, bytes 4 to 7 the offsets
    likewise, bytes 8 to 11 the four low bits of scales 4 to 7, those of the offsets above them.
    """

    source: str = "both"

    def encode(self, numbers: Mapping[str, Tensor]) -> Tensor:
        scales, more_scales, offsets, more_offsets = numbers[self.source].chunk(4, dim=1)
        return torch.cat(
            [
                scales | (more_scales >> 4 << 6),
                offsets | (more_offsets >> 4 << 6),
                (more_scales & 15) | (more_offsets << 4),
            ],
            dim=1,
        )

    def decode(self, data: Tensor, numbers: MutableMapping[str, Tensor]) -> int:
        scales, offsets, low = data[:, :12].chunk(3, dim=1)
        numbers[self.source] = torch.cat(
            [scales & 63, (low & 15) | (scales >> 6 << 4), offsets & 63, (low >> 4) | (offsets >> 6 << 4)], dim=1
        )
        return 12


@dataclass(frozen=True)
class Trits:
    """Ternary numbers, five a byte (TQ1_0): 160 in 32 bytes, 80 in 16, and the last 16 four a byte in 4.

    Within each run a byte takes numbers 32, 16, 4 apart; they are the digits t0 to t4 of the number
    n = 81 t0 + 27 t1 + 9 t2 + 3 t3 + t4 (t4 = 0 where there are four), and the byte is ceil(256 n / 243): times 3, the
    digits come out in turn above the lowest eight bits.
    """

    source: str = "codes"

    def encode(self, numbers: Mapping[str, Tensor]) -> Tensor:
        trits = numbers[self.source].to(torch.int32)
        columns = []
        for start, size, digits in _TRIT_RUNS:
            places = 3 ** torch.arange(4, 4 - digits, -1, dtype=torch.int32, device=trits.device)
            run = trits[:, start : start + size * digits].reshape(-1, digits, size)
            columns.append(((run * places[:, None]).sum(1) * 256 + 242) // 243)
        return torch.cat(columns, dim=1).to(torch.uint8)

    def decode(self, data: Tensor, numbers: MutableMapping[str, Tensor]) -> int:
        runs, at = [], 0
        for _, size, digits in _TRIT_RUNS:
            powers = 3 ** torch.arange(digits, dtype=torch.int32, device=data.device)
            shifted = (data[:, None, at : at + size].to(torch.int32) * powers[:, None]) & 255
            runs.append((shifted * 3 >> 8).to(torch.uint8).flatten(1))
            at += size
        numbers[self.source] = torch.cat(runs, dim=1)
        if not torch.equal(self.encode(numbers), data[:, :at]):
            raise SpecError("a byte of the ternary codes is none that five digits give; the data was changed")
        return at


_TRIT_RUNS = ((0, 32, 5), (160, 16, 5), (240, 4, 4))
"""First number, bytes, and digits a byte of each run."""
