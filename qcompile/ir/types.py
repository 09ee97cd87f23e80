"""Short names of dtypes and the spelling of tensor types in the IR text: ``f32[batch, 64]``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeAlias

import sympy
import torch

DTYPES: dict[str, torch.dtype] = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
    "f8e4m3fn": torch.float8_e4m3fn,
    "f8e4m3fnuz": torch.float8_e4m3fnuz,
    "f8e5m2": torch.float8_e5m2,
    "f8e5m2fnuz": torch.float8_e5m2fnuz,
    "f8e8m0": torch.float8_e8m0fnu,
    "i8": torch.int8,
    "i16": torch.int16,
    "i32": torch.int32,
    "i64": torch.int64,
    "u8": torch.uint8,
    "u16": torch.uint16,
    "u32": torch.uint32,
    "u64": torch.uint64,
    "c64": torch.complex64,
    "c128": torch.complex128,
    "bool": torch.bool,
}
SHORT: dict[torch.dtype, str] = {dtype: short for short, dtype in DTYPES.items()}

Dim: TypeAlias = int | sympy.Expr


def dim_expr(size: Any) -> Dim:
    """An int, or the sympy expression behind a ``torch.SymInt``."""
    return int(size) if isinstance(size, int) else size.node.expr


def named(expr: Dim, symbols: Mapping[sympy.Symbol, str]) -> str:
    """Print a size with its symbols' public names: ``s17 + s70`` ⟶ ``past + sequence``."""
    if isinstance(expr, int):
        return str(expr)
    free = [s for s in expr.free_symbols if isinstance(s, sympy.Symbol)]
    return str(expr.xreplace({s: sympy.Symbol(symbols[s], integer=True) for s in free if s in symbols}))


def type_of(value: Any, symbols: Mapping[sympy.Symbol, str]) -> str:
    """The type of a node's value as the IR prints it."""
    if isinstance(value, torch.Tensor):
        sizes = ", ".join(named(dim_expr(d), symbols) for d in value.shape)
        return f"{SHORT[value.dtype]}[{sizes or '()'}]"
    if isinstance(value, (list, tuple)):
        return f"tuple[{', '.join(type_of(v, symbols) for v in value)}]"
    if isinstance(value, (bool, torch.SymBool)):
        return "sym_bool"
    if isinstance(value, (int, torch.SymInt)):
        return f"sym[{named(dim_expr(value), symbols)}]"
    if isinstance(value, (float, torch.SymFloat)):
        return "sym_float"
    return "none"
