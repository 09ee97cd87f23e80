"""The order of a weight's codes for a kernel that loads a tile of words and unpacks it with shifts alone.

The weight `[N, K]` of y = x Wᵀ is cut along K into runs of `block_k`. A run's codes lie in int32 words, 32 / w codes of
w bits each; there are block_k * w / 32 words a run and output, and

    field j of word i of run r holds the code of k = r * block_k + j * (block_k * w / 32) + i
    words [K * w / 32, N]: row r * (block_k * w / 32) + i, column n

so that neighbouring threads load neighbouring words (N is contiguous), and field j of a tile of words *is* the tile of
codes of one contiguous stretch of K: nothing is shuffled afterwards. With w = 4, block_k = 128:

    words = tl.load(base + (run * 16 + tl.arange(0, 16))[:, None] * N + columns[None, :])        # [16, BLOCK_N]
    tile = (words[None, :, :] >> (4 * tl.arange(0, 8))[:, None, None]) & 15                      # [8, 16, BLOCK_N]
    tile = tl.reshape(tile, [128, BLOCK_N])                                                      # [block_k, BLOCK_N]

Codes are stored from 0 up: a signed one has 2^(bits - 1) added, which belongs to what is subtracted as zero-point.
Widths that do not divide 32 are sums of those that do: 3 bits are a plane of the two low bits and one of the high bit
(7: 4, 2 and 1), each a tensor of words in this order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.packing import check_codes, code_range, from_unsigned, pack_words, to_unsigned, unpack_words


@dataclass(frozen=True)
class TileOrder:
    """The order for codes of `bits` bits (1 to 8), signed or not, in runs of `block_k`.

    >>> TileOrder(bits=3, signed=True, block_k=64).widths
    (2, 1)
    """

    bits: int
    signed: bool
    block_k: int

    def __post_init__(self) -> None:
        code_range(self.bits, self.signed)
        if self.block_k < 1 or self.block_k * self.widths[-1] % 32:
            unit = 32 // self.widths[-1]
            raise SpecError(f"block_k={self.block_k} does not fill int32 words; use a multiple of {unit}")

    @property
    def widths(self) -> tuple[int, ...]:
        """Bits of each plane, the plane of the lowest bits first."""
        return tuple(width for width in (8, 4, 2, 1) if self.bits & width)

    def pack(self, codes: Tensor) -> tuple[Tensor, ...]:
        """Codes `[N, K]`, int8 where signed, else uint8, as one int32 `[K * width / 32, N]` a plane.

        Raises SpecError where block_k does not divide K, and for codes out of range or of another dtype.
        """
        outputs, inputs = codes.shape
        if inputs % self.block_k:
            raise SpecError(
                f"block_k={self.block_k} does not divide rows of {inputs} codes; use a divisor such as "
                f"{gcd(inputs, self.block_k)}"
            )
        if codes.dtype != (torch.int8 if self.signed else torch.uint8):
            raise SpecError(f"{self} was given codes of {codes.dtype}; signed codes are int8, others uint8")
        check_codes(codes, *code_range(self.bits, self.signed), "the tensor to pack")
        stored = to_unsigned(codes, self.bits)
        planes, start = [], 0
        for width in self.widths:
            part = (stored >> start) & ((1 << width) - 1)
            runs = part.view(outputs, inputs // self.block_k, 32 // width, self.block_k * width // 32)
            words = pack_words(runs.transpose(2, 3), width)  # [N, runs, words a run, 1]
            planes.append(words.view(outputs, -1).t().contiguous())
            start += width
        return tuple(planes)

    def unpack(self, planes: Sequence[Tensor]) -> Tensor:
        """The codes that `pack` turned into `planes`; SpecError where there are not as many, or of another shape."""
        shapes = [list(plane.shape) for plane in planes]
        inputs = len(planes[0]) * 32 // self.widths[0] if planes else 0
        if shapes != [[inputs * width // 32, planes[0].shape[-1]] for width in self.widths]:
            raise SpecError(f"{self} has planes of {self.widths} bits, and given are {shapes}; pass what pack returned")
        outputs = planes[0].shape[1]
        stored, start = torch.zeros(outputs, inputs, dtype=torch.uint8, device=planes[0].device), 0
        for width, plane in zip(self.widths, planes, strict=True):
            words = plane.t().reshape(outputs, -1, self.block_k * width // 32, 1)
            runs = unpack_words(words, width, 32 // width, signed=False).transpose(2, 3)
            stored |= runs.reshape(outputs, inputs) << start
            start += width
        return from_unsigned(stored, self.bits, self.signed)
