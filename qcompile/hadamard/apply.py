"""The Hadamard transform in Python: the operator with defaults, and its dense matrix."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from qcompile.hadamard.construct import check_order, hadamard, kronecker
from qcompile.hadamard.op import HADAMARD


def apply_hadamard(x: Tensor, order: int, block: int | None = None, transpose: bool = False) -> Tensor:
    """Every run of `block` elements of the last axis of `x` [..., n] times the orthonormal `matrix(order, block)`.

    `block` is n unless given; `transpose` applies the inverse. Differentiable; shape, dtype and errors are those of
    `qcompile::hadamard` (see `op`).
    """
    result: Tensor = HADAMARD(x, order, x.shape[-1] if block is None else block, transpose)
    return result


def matrix(order: int, block: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """T = H_order ⊗ Sylvester(block / order) / √block, [block, block]: what the operator applies, written out."""
    check_order(order, block)
    whole = kronecker([hadamard(order), hadamard(block // order)]).to(dtype)
    return whole / math.sqrt(block)
