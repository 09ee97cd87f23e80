"""AWQ: the `gemm` version of AutoAWQ's files, 4 bits.

    qweight  int32 [in, out / 8]      qzeros  int32 [groups, out / 8]      scales  [groups, out]

A word holds eight neighbouring *outputs* of one input, from its low bits up the outputs 0 2 4 6 1 3 5 7 of the eight.
Codes and zero-points are unsigned; a signed code has 8 added.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.backends.hf.pack import Grouped
from qcompile.errors import SpecError
from qcompile.numerics.packing import check_codes, from_unsigned, pack_words, to_unsigned, unpack_words

ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
_BACK = (0, 4, 1, 5, 2, 6, 3, 7)
_BITS = 4


@dataclass(frozen=True)
class Awq:
    """The layout for four-bit codes, signed or not, with a zero-point unless `symmetric`."""

    signed: bool
    symmetric: bool

    def pack(self, weight: Grouped) -> dict[str, Tensor]:
        """qweight, qzeros and scales.

        Raises SpecError where the outputs are no multiple of 8, inputs are not in order, or codes are out of range.
        """
        if len(weight.codes) % 8:
            raise SpecError(f"AWQ holds 8 outputs a word, and {len(weight.codes)} is no multiple of 8; leave it out")
        if weight.group_index is not None:
            raise SpecError("AWQ has no group_index: its inputs lie in order; permute them first, or use GPTQ")
        return {
            "qweight": _pack_outputs(weight.codes),
            "qzeros": _pack_outputs(weight.zeros(self.symmetric)),
            "scales": weight.scale.t().contiguous(),
        }

    def unpack(self, tensors: Mapping[str, Tensor]) -> Grouped:
        """What `pack` was given. Raises SpecError where a symmetric file has a zero-point."""
        outputs = tensors["scales"].shape[1]
        zero = _unpack_outputs(tensors["qzeros"], outputs, self.signed)
        if self.symmetric:
            check_codes(zero, 0, 0, "qzeros of a symmetric weight")
        return Grouped(
            _unpack_outputs(tensors["qweight"], outputs, self.signed),
            tensors["scales"].t().contiguous(),
            None if self.symmetric else zero,
        )


def _pack_outputs(codes: Tensor) -> Tensor:
    """[out, n] to int32 [n, out / 8]."""
    eights = to_unsigned(codes, _BITS).t().reshape(codes.shape[1], -1, 8)
    order = torch.tensor(ORDER, device=codes.device)
    return pack_words(eights[..., order].flatten(1), _BITS)


def _unpack_outputs(words: Tensor, outputs: int, signed: bool) -> Tensor:
    eights = unpack_words(words, _BITS, outputs, signed=False).view(len(words), -1, 8)
    order = torch.tensor(_BACK, device=words.device)
    return from_unsigned(eights[..., order].flatten(1).t().contiguous(), _BITS, signed)
