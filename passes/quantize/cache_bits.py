"""Codes of 1, 2 or 4 bits, several in a byte, by plain bit operators: for codes that are made as the program runs.

A row of n codes of b bits becomes m = n·b/8 bytes. Byte j holds codes j, j + m, j + 2m, …, the first in its lowest
bits; negative codes are two's complement. So packing cuts a row into equal parts and lays them over each other, and
unpacking joins them again: no axis is split, and sizes known at run time only are never named.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.ir.program import Program

aten = torch.ops.aten


def codes_per_byte(bits: int, features: int) -> int:
    """How many codes of a row of `features` share a byte: 8, 4 or 2 for 1, 2 or 4 bits that fill bytes, else 1."""
    count = 8 // bits if bits in (1, 2, 4) else 1
    return count if features % count == 0 else 1


def pack(program: Program, codes: fx.Node, bits: int, before: fx.Node, module: str) -> fx.Node:
    """Insert what packs `codes`, int8 or uint8 ``[…, n]``, into uint8 ``[…, n·bits/8]``."""
    call = _caller(program, before, module)
    if codes.meta["val"].dtype == torch.int8:
        codes = call(aten.to.dtype, call(aten.bitwise_and.Scalar, codes, (1 << bits) - 1), torch.uint8)
    width = int(codes.meta["val"].shape[-1]) * bits // 8
    packed = call(aten.slice.Tensor, codes, -1, 0, width)
    for lane in range(1, 8 // bits):
        part = call(aten.slice.Tensor, codes, -1, lane * width, (lane + 1) * width)
        packed = call(aten.bitwise_or.Tensor, packed, call(aten.bitwise_left_shift.Tensor_Scalar, part, lane * bits))
    return packed


def unpack(program: Program, packed: fx.Node, bits: int, signed: bool, before: fx.Node, module: str) -> fx.Node:
    """Insert the inverse of `pack`: int8 codes where `signed`, else uint8."""
    call = _caller(program, before, module)
    mask, lanes = (1 << bits) - 1, []
    for lane in range(8 // bits):
        part = call(aten.bitwise_right_shift.Tensor_Scalar, packed, lane * bits) if lane else packed
        lanes.append(call(aten.bitwise_and.Scalar, part, mask))
    codes = call(aten.cat.default, lanes, -1)
    if not signed:
        return codes
    sign = 1 << (bits - 1)
    return call(aten.sub.Scalar, call(aten.bitwise_xor.Scalar, call(aten.to.dtype, codes, torch.int8), sign), sign)


def _caller(program: Program, before: fx.Node, module: str) -> Callable[..., fx.Node]:
    def call(target: Callable[..., Any], *args: Any) -> fx.Node:
        return program.call(target, args, before=before, module=module)

    return call
