"""GPTQ: the checkpoint formats `gptq` and `gptq_v2` of AutoGPTQ and GPTQModel.

For a linear of `in` inputs and `out` outputs, b bits, `groups` groups:

    qweight  int32 [in * b / 32, out]      column n is the dense stream of the codes of output n
    qzeros   int32 [groups, out * b / 32]  row g is the dense stream of group g's zero-points
    scales         [groups, out]
    g_idx    int32 [in]                    the group of each input

Codes and zero-points are unsigned (a signed code has 2^(b-1) added), so at 3 bits 32 codes fill 3 words, two of them
across a border. A `gptq` file holds z - 1, a `gptq_v2` file z. Zero-points of 0 are refused in the first: readers take
the stored -1 for 0 (AutoGPTQ at 2, 4, 8 bits), for 2^b (AutoGPTQ at 3 bits), and AutoGPTQ's writer spoils the
neighbours' bits with it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.backends.hf.pack import Grouped, ordered_index
from qcompile.errors import SpecError
from qcompile.numerics.packing import check_codes, from_unsigned, pack_words, to_unsigned, unpack_words

BITS = (2, 3, 4, 8)


@dataclass(frozen=True)
class Gptq:
    """The layout for codes of `bits` bits (2, 3, 4 or 8), signed or not, with a zero-point unless `symmetric`."""

    bits: int
    signed: bool
    symmetric: bool
    version: int = 1

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise SpecError(f"GPTQ files hold codes of 2, 3, 4 or 8 bits, not {self.bits}; use compressed-tensors")
        if self.version not in (1, 2):
            raise SpecError(f"GPTQ's checkpoint formats are version 1 (gptq) and 2 (gptq_v2), not {self.version}")

    def pack(self, weight: Grouped) -> dict[str, Tensor]:
        """qweight, qzeros, scales and g_idx.

        Raises SpecError where inputs or outputs do not fill int32 words, for codes out of range, and for a zero-point
        of 0 in version 1.
        """
        (outputs, inputs), groups = weight.codes.shape, weight.scale.shape[1]
        unit = 32 if self.bits == 3 else 32 // self.bits
        if inputs % unit or outputs % unit:
            raise SpecError(
                f"a weight of shape [{outputs}, {inputs}] does not fill int32 words of {self.bits} bits a code: both "
                f"sizes must be multiples of {unit}; leave it out, or use compressed-tensors"
            )
        index = ordered_index(inputs, groups) if weight.group_index is None else weight.group_index
        return {
            "qweight": pack_words(to_unsigned(weight.codes, self.bits), self.bits).t().contiguous(),
            "qzeros": pack_words(self._stored_zeros(weight).t().contiguous(), self.bits),
            "scales": weight.scale.t().contiguous(),
            "g_idx": index.to(weight.codes.device),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> Grouped:
        """What `pack` was given. Raises SpecError where a symmetric file has another zero-point than 2^(b-1)."""
        scales, index = tensors["scales"], tensors["g_idx"]
        inputs, (groups, outputs) = len(index), scales.shape
        codes = unpack_words(tensors["qweight"].t().contiguous(), self.bits, inputs, signed=False)
        stored = unpack_words(tensors["qzeros"], self.bits, outputs, signed=False)
        if self.version == 1:
            check_codes(stored, 0, (1 << self.bits) - 2, "qzeros")
            stored = stored + 1
        if self.symmetric:
            middle = 1 << (self.bits - 1) if self.signed else 0
            check_codes(stored, middle, middle, "qzeros of a symmetric weight")
        in_order = inputs % groups == 0 and torch.equal(index, ordered_index(inputs, groups, index.device))
        return Grouped(
            from_unsigned(codes, self.bits, self.signed),
            scales.t().contiguous(),
            None if self.symmetric else from_unsigned(stored.t().contiguous(), self.bits, self.signed),
            None if in_order else index,
        )

    def _stored_zeros(self, weight: Grouped) -> Tensor:
        """uint8 `[out, groups]`."""
        zero = to_unsigned(weight.zeros(self.symmetric), self.bits)
        if self.version == 2:
            return zero
        if not bool(zero.all()):
            lowest = -(1 << (self.bits - 1)) if self.signed else 0
            raise SpecError(
                f"a zero-point of {lowest}, the lowest code, cannot be stored in GPTQ version 1, which holds z - 1; "
                "use version 2 (gptq_v2), or compressed-tensors"
            )
        return zero - 1
