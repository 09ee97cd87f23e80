"""Applying a Kronecker product of small matrices along an axis, in pieces that stay in the processor's cache.

Along the last axis each factor is one batched product that also turns the axes by one, so that after all of them they
are back in order: rows [R, n] as [R, n/r, r] → F·Xᵀ: [R, r, n/r]. Along another axis a factor multiplies from the left.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qcompile.hadamard.construct import factors, hadamard, kronecker, power_of_two

_PIECE, _ELSEWHERE = 1 << 19, 1 << 26
"""Elements that are worked on at a time: on a CPU for each thread, 2 MiB of float32 in its cache; on other devices."""
_COLUMNS = 32
"""The fewest columns that are taken from a matrix at a time, for whole cache lines."""
_DENSE = 128
"""Up to this size one dense product is no slower than several small ones (measured, float32, AVX-512)."""
_BITS = 4
"""Sylvester factors have up to 2⁴ rows: smaller ones mean more runs over the data, larger ones more arithmetic."""


@dataclass(frozen=True)
class Transform:
    """y = F·x of runs of `block`, F the Kronecker product of `matrices`; x·`before`, y·`after` where these are given.

    `before` and `after` have as many elements as the axis; all are on one device, in the dtype that is computed in.
    """

    matrices: tuple[Tensor, ...]
    before: Tensor | None = None
    after: Tensor | None = None

    @property
    def block(self) -> int:
        return math.prod(matrix.shape[0] for matrix in self.matrices)

    @property
    def dtype(self) -> torch.dtype:
        return self.matrices[0].dtype


def split(order: int, block: int, bits: int = _BITS, dense: int = _DENSE) -> tuple[tuple[int, ...], ...]:
    """The Kronecker factors that are applied one after the other, each as the orders of the matrices it is made of."""
    whole = (*(factor for factor in factors(order) if factor > 1), block // order)
    if block <= dense:
        return (whole,)
    parts: list[tuple[int, ...]] = []
    for factor in whole:
        if not power_of_two(factor):
            parts.append((factor,))
        elif factor > 1:
            exponent = factor.bit_length() - 1
            count = -(-exponent // bits)
            parts += [(2 ** (exponent // count + (i < exponent % count)),) for i in range(count)]
    return tuple(parts)


@lru_cache(maxsize=256)
def orthonormal(
    order: int, block: int, inverse: bool, dtype: torch.dtype, device: torch.device, bits: int = _BITS
) -> tuple[Tensor, ...]:
    """The matrices of `split`, transposed for the inverse; the last one carries 1/√block."""
    made = [kronecker([hadamard(factor) for factor in part]).to(device, dtype) for part in split(order, block, bits)]
    made = [matrix.T.contiguous() if inverse else matrix for matrix in made]
    return (*made[:-1], made[-1] / math.sqrt(block))


def along_last(x: Tensor, transform: Transform) -> Tensor:
    """The transformation of the last axis of `x` [..., n]; computed in the transform's dtype, rounded once to x's."""
    rows = x.reshape(-1, x.shape[-1])
    result = torch.empty_like(rows, memory_format=torch.contiguous_format)
    direct = x.dtype == transform.dtype and transform.after is None
    for start, stop in _pieces(rows.shape[0], max(1, _size(x) // max(1, rows.shape[1]))):
        piece = rows[start:stop].to(transform.dtype)
        if transform.before is not None:
            piece = piece * transform.before
        out = result[start:stop] if direct else torch.empty_like(piece, memory_format=torch.contiguous_format)
        _rows(piece.reshape(-1, transform.block), transform.matrices, out.view(-1, transform.block))
        if transform.after is not None:
            out = out.mul_(transform.after)
        if not direct:
            result[start:stop] = out
    return result.view(x.shape)


def along(x: Tensor, axis: int, transform: Transform) -> Tensor:
    """The transformation of any axis of `x`, in a tensor of x's shape and dtype."""
    axis %= x.dim()
    if axis == x.dim() - 1:
        return along_last(x, transform)
    n = x.shape[axis]
    stacked = x.reshape(math.prod(x.shape[:axis]), n, math.prod(x.shape[axis + 1 :]))
    result = torch.empty_like(stacked, memory_format=torch.contiguous_format)
    depth, _, columns = stacked.shape
    wide = max(_COLUMNS, _size(x) // max(1, n))
    deep = max(1, wide // max(1, columns))
    for top, bottom in _pieces(depth, deep):
        for left, right in _pieces(columns, wide):
            piece = stacked[top:bottom, :, left:right].to(transform.dtype)
            if transform.before is not None:
                piece = piece * transform.before[:, None]
            piece = _columns(piece.contiguous(), transform.matrices)
            if transform.after is not None:
                piece.mul_(transform.after[:, None])
            result[top:bottom, :, left:right] = piece
    return result.view(x.shape)


def _rows(x: Tensor, matrices: Sequence[Tensor], out: Tensor) -> None:
    """`out` [R, n] ← each row of `x` [R, n] transformed."""
    rows, n = x.shape
    if len(matrices) == 1:
        torch.mm(x, matrices[0].T, out=out)
        return
    for i, matrix in enumerate(reversed(matrices)):
        r = matrix.shape[0]
        batch, turned = matrix.expand(rows, r, r), x.view(rows, n // r, r).transpose(1, 2)
        if i == len(matrices) - 1:
            torch.bmm(batch, turned, out=out.view(rows, r, n // r))
        else:
            x = torch.bmm(batch, turned).view(rows, n)


def _columns(x: Tensor, matrices: Sequence[Tensor]) -> Tensor:
    """The middle axis of contiguous `x` [A, n, M] transformed."""
    shape, inner = x.shape, x.shape[2]
    for matrix in reversed(matrices):
        r = matrix.shape[0]
        stacked = x.view(-1, r, inner)
        x = torch.bmm(matrix.expand(stacked.shape[0], r, r), stacked)
        inner *= r
    return x.view(shape)


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _size(x: Tensor) -> int:
    return _PIECE * torch.get_num_threads() if x.device.type == "cpu" else _ELSEWHERE
