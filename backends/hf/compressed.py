"""compressed-tensors: the format `pack-quantized`, 1 to 8 bits.

    weight_packed      int32 [out, ceil(in * b / 32)]      row n is the dense stream of the codes of output n
    weight_scale             [out, groups]
    weight_shape       int64 [2]                           out, in
    weight_zero_point  int32 [ceil(out * b / 32), groups]  column g is the dense stream of group g's zero-points

Codes are stored from 0 up: 2^(b-1) is added to a signed one. Releases that packed 32 // b codes a word, with bits left
over at 3, 5, 6 and 7 bits, read those widths otherwise; the dense stream is that of release 0.20.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.backends.hf.pack import Grouped
from qcompile.errors import SpecError
from qcompile.numerics.packing import from_unsigned, pack_words, to_unsigned, unpack_words


@dataclass(frozen=True)
class PackQuantized:
    """The layout for codes of `bits` bits, signed or not, with a zero-point unless `symmetric`."""

    bits: int
    signed: bool
    symmetric: bool

    def pack(self, weight: Grouped) -> dict[str, Tensor]:
        """weight_packed, weight_scale, weight_shape, and weight_zero_point unless `symmetric`.

        Raises SpecError for codes out of range, inputs that are not in order, and unsigned codes without a zero-point
        (readers take the middle code for 0).
        """
        if weight.group_index is not None:
            raise SpecError("pack-quantized holds inputs in order; permute them first, or use GPTQ with its g_idx")
        if self.symmetric and not self.signed:
            raise SpecError(f"{self}: readers take code {1 << (self.bits - 1)} for 0; use a signed element, or asym")
        tensors = {
            "weight_packed": pack_words(to_unsigned(weight.codes, self.bits), self.bits),
            "weight_scale": weight.scale.contiguous(),
            "weight_shape": torch.tensor(weight.codes.shape),
        }
        zero = to_unsigned(weight.zeros(self.symmetric), self.bits)
        if not self.symmetric:
            tensors["weight_zero_point"] = pack_words(zero.t().contiguous(), self.bits).t().contiguous()
        return tensors

    def unpack(self, tensors: Mapping[str, Tensor]) -> Grouped:
        """What `pack` was given."""
        outputs, inputs = tensors["weight_shape"].tolist()
        codes = unpack_words(tensors["weight_packed"], self.bits, inputs, signed=False)
        zero = None
        if not self.symmetric:
            columns = tensors["weight_zero_point"].t().contiguous()
            stored = unpack_words(columns, self.bits, outputs, signed=False)
            zero = from_unsigned(stored.t().contiguous(), self.bits, self.signed)
        return Grouped(from_unsigned(codes, self.bits, self.signed), tensors["weight_scale"], zero)
