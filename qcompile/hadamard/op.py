"""The Hadamard transform as an operator of a program, known to torch.library (and so to torch.export).

    qcompile::hadamard(Tensor x, int order, int block, bool inverse=False) -> Tensor

The last axis of `x` [..., n] is cut into runs of `block`, which divides n, and every run becomes T·run with the
orthonormal T = H_order ⊗ Sylvester(block / order) / √block, or Tᵀ·run for the inverse. `order` is 1 for the
Walsh–Hadamard transform, `block / order` a power of two; the matrix is known by these two numbers and never stored.
Result: x's shape, dtype and device; float64 is computed in float64, all else in float32 and rounded once. O(n log n).
The gradient is the inverse. Raises HadamardError where no such matrix is known or a size does not fit.

Importing this module registers it as `torch.ops.qcompile.hadamard`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.hadamard.construct import HadamardError, check_order
from qcompile.hadamard.kernel import Transform, along_last, orthonormal


def _check(x: Tensor, order: int, block: int) -> None:
    if x.dim() == 0 or not x.is_floating_point():
        raise HadamardError(f"a Hadamard transform of {x.dtype} of rank {x.dim()}; it takes floats of rank 1 or more")
    check_order(order, block)
    if x.shape[-1] % block:
        raise HadamardError(f"a block of {block} does not divide the last axis, {x.shape[-1]}; use one that does")


def _hadamard(x: Tensor, order: int, block: int, inverse: bool = False) -> Tensor:
    _check(x, order, block)
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    return along_last(x, Transform(orthonormal(order, block, inverse, dtype, x.device)))


def _fake(x: Tensor, order: int, block: int, inverse: bool = False) -> Tensor:
    _check(x, order, block)
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _setup(ctx: Any, inputs: tuple[Tensor, int, int, bool], output: Tensor) -> None:
    _, ctx.order, ctx.block, ctx.inverse = inputs


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
    back: Tensor = HADAMARD(grad, ctx.order, ctx.block, not ctx.inverse)
    return back, None, None, None


torch.library.define("qcompile::hadamard", "(Tensor x, int order, int block, bool inverse=False) -> Tensor")
torch.library.impl("qcompile::hadamard", "CompositeExplicitAutograd", _hadamard)
torch.library.register_fake("qcompile::hadamard", _fake)
torch.library.register_autograd("qcompile::hadamard", _backward, setup_context=_setup)

HADAMARD = torch.ops.qcompile.hadamard.default
