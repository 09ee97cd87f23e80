"""How tensors and literals are spelled in MLIR: torch dialect types, builtin types, constants."""

from __future__ import annotations

import struct
from collections.abc import Iterable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor

from qcompile.errors import LoweringError
from qcompile.ir.types import dim_expr

Sizes = Mapping[sympy.Symbol, int]
"""Symbols of a program that are fixed in one entry point: a step of decoding has batch 1 and sequence 1."""

_TORCH = {
    torch.float64: "f64",
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.int64: "si64",
    torch.int32: "si32",
    torch.int16: "si16",
    torch.int8: "si8",
    torch.uint8: "ui8",
    torch.bool: "i1",
}
_SCALAR_TYPE = {
    torch.uint8: 0,
    torch.int8: 1,
    torch.int16: 2,
    torch.int32: 3,
    torch.int64: 4,
    torch.float16: 5,
    torch.float32: 6,
    torch.float64: 7,
    torch.bool: 11,
    torch.bfloat16: 15,
}
"""c10::ScalarType, which is how a dtype is an argument."""


def taken(dtype: torch.dtype) -> bool:
    """Whether tensors of `dtype` can be written.

    >>> taken(torch.float32), taken(torch.complex64)
    (True, False)
    """
    return dtype in _TORCH


def scalar_type(dtype: torch.dtype) -> int:
    """The number that stands for a dtype in an operator's arguments."""
    if dtype not in _SCALAR_TYPE:
        raise LoweringError(f"the torch dialect is given no {dtype}; capture the model with dtype=float32")
    return _SCALAR_TYPE[dtype]


def element(dtype: torch.dtype) -> str:
    """The builtin type of an element, without a sign.

    >>> element(torch.int64), element(torch.uint8), element(torch.float16)
    ('i64', 'i8', 'f16')
    """
    name = _TORCH[dtype]
    return name.lstrip("su") if name[0] in "su" else name


def sizes_of(shape: Iterable[Any], fixed: Sizes) -> list[int | None]:
    """Sizes of a tensor; None for one that varies."""
    found: list[int | None] = []
    for size in shape:
        expr = dim_expr(size)
        value = expr if isinstance(expr, int) else expr.subs(fixed)
        found.append(int(value) if isinstance(value, int) or value.is_Integer else None)
    return found


def vtensor(value: Tensor, fixed: Sizes) -> str:
    """``!torch.vtensor<[?,64],f32>``."""
    sizes = ",".join("?" if size is None else str(size) for size in sizes_of(value.shape, fixed))
    return f"!torch.vtensor<[{sizes}],{_TORCH[value.dtype]}>"


def builtin(sizes: Iterable[int | None], kind: str) -> str:
    """A builtin tensor type.

    >>> builtin([None, 64], "i4")
    'tensor<?x64xi4>'
    """
    return f"tensor<{''.join('?x' if size is None else f'{size}x' for size in sizes)}{kind}>"


def float_bits(value: float) -> str:
    """A float64 as MLIR's hexadecimal, which holds every value exactly.

    >>> float_bits(1.0)
    '0x3FF0000000000000'
    """
    return f"0x{struct.pack('>d', value).hex().upper()}"
