"""Codes as the bytes that MLIR's narrow integers are bitcast from, and as `quant.matmul_rhs_group_quant` takes them.

Both put the first code of a byte into its low bits. What differs is the sign: an `i4` is two's complement and extended
with or without its sign as the program says; the custom operator always takes its weights as unsigned.

A code of b bits lies in the narrowest of i2, i4 and i8 that holds it. IREE stores integers of 3, 5, 6 and 7 bits as
those anyway, and an i1 as a whole byte, so that bytes bitcast to i1 are none (iree-compile 3.13 refuses them).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.packing import code_range, from_unsigned, pack, to_unsigned, unpack


def container_bits(bits: int) -> int:
    """Bits of the integer that holds codes of `bits`: 2, 4 or 8.

    >>> [container_bits(bits) for bits in (1, 2, 3, 4, 5, 8)]
    [2, 2, 4, 4, 8, 8]
    """
    code_range(bits, signed=True)
    return 2 if bits <= 2 else 4 if bits <= 4 else 8


def pack_groups(codes: Tensor, group: int, bits: int) -> Tensor:
    """Codes `[N, K]`, int8 or uint8, as int8 `[N, K / group, group * w / 8]`, w = container_bits(bits).

    `flow.tensor.bitcast` makes it `tensor<N x K/group x group x iW>`, to be extended with its sign where codes are int8
    (arith.extsi), without where they are uint8 (arith.extui).

    Raises SpecError where the group does not divide K or fills no whole bytes, and for codes out of range.
    """
    outputs, inputs = codes.shape
    width = container_bits(bits)
    if group < 1 or inputs % group or group * width % 8:
        raise SpecError(
            f"groups of {group} codes of {width} bits do not divide rows of {inputs} into whole bytes; use another "
            "group size"
        )
    return pack(codes, width).view(torch.int8).view(outputs, inputs // group, group * width // 8)


def unpack_groups(packed: Tensor, bits: int, signed: bool) -> Tensor:
    """The codes `[N, K]` that `pack_groups` turned into `packed`, int8 `[N, groups, bytes]`."""
    width = container_bits(bits)
    if packed.dtype != torch.int8 or packed.dim() != 3:
        raise SpecError(f"packed groups are int8 [N, groups, bytes], not {packed.dtype}{list(packed.shape)}")
    shape = (packed.shape[0], packed[0].numel() * 8 // width)
    return unpack(packed.contiguous().view(torch.uint8), width, shape, signed)


@dataclass(frozen=True, eq=False)
class MatmulRhs:
    """Operands of `quant.matmul_rhs_group_quant(lhs, rhs, scale, zero_point, bit_width, group_size)`.

    Torch-mlir lowers it to (zero-extended rhs - zero_point) * scale, group by group (lib/Dialect/TorchConversion/
    Transforms/ConvertCustomQuantOp.cpp), after splitting bytes low half first (UnpackQuantTensor.cpp).

    - `rhs` uint8 `[N, K * bit_width / 8]`
    - `scale`, `zero_point` `[N, groups, 1]`, of one float dtype
    """

    rhs: Tensor
    scale: Tensor
    zero_point: Tensor
    bit_width: int
    group_size: int


def pack_matmul_rhs(codes: Tensor, scale: Tensor, zero_point: Tensor | None, bits: int) -> MatmulRhs:
    """Codes `[N, K]`, int8 or uint8, with scale and zero-point (or None) `[N, groups]`.

    Signed codes and their zero-points have 2^(bit_width - 1) added. (Shifted into place as they are, as an exporter
    once did, a negative code sets every bit of the codes above it.)

    Raises SpecError where shapes do not fit, for codes out of range, and for a zero-point that the scale's dtype does
    not hold.
    """
    (outputs, inputs), width = codes.shape, container_bits(bits)
    if scale.dim() != 2 or len(scale) != outputs or inputs % scale.shape[1] or inputs * width % 8:
        raise SpecError(
            f"codes {list(codes.shape)} of {width} bits with a scale {list(scale.shape)}: needed are [N, K] and "
            "[N, groups], groups dividing K, and rows of whole bytes"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise SpecError(f"a zero-point {list(zero_point.shape)} for a scale {list(scale.shape)}; they must be equal")
    middle = 1 << (width - 1) if codes.dtype == torch.int8 else 0
    zero = torch.zeros_like(scale, dtype=torch.float64) if zero_point is None else zero_point.to(torch.float64)
    stored = (zero + middle).to(scale.dtype)
    if not torch.equal(stored.to(torch.float64) - middle, zero):
        raise SpecError(f"a zero-point plus {middle} is no {scale.dtype}; use zero=int, or an unsigned element")
    packed = pack(to_unsigned(codes, width), width).view(outputs, inputs * width // 8)
    return MatmulRhs(packed, scale[..., None], stored[..., None], width, inputs // scale.shape[1])


def unpack_matmul_rhs(packed: MatmulRhs, signed: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Codes `[N, K]`, scale and zero-point `[N, groups]`, both of the scale's dtype."""
    width, rhs = packed.bit_width, packed.rhs
    codes = unpack(rhs, width, (len(rhs), rhs.shape[1] * 8 // width), signed=False)
    zero = packed.zero_point[..., 0] - (1 << (width - 1) if signed else 0)
    return from_unsigned(codes, width, signed), packed.scale[..., 0], zero
