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
    for start, stop in _pieces(rows.shape[0], max(1, _size(x) // max(1, rows.shape[1]))):
        piece = rows[start:stop].to(transform.dtype)
        if transform.before is not None:
            piece = piece * transform.before
        done = _rows(piece.reshape(-1, transform.block), transform.matrices, (None, None)).view(piece.shape)
        result[start:stop] = done if transform.after is None else done.mul_(transform.after)
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


def along_into(x: Tensor, axis: int, transform: Transform, spare: Tensor) -> Tensor:
    """As `along`, without new memory: both are contiguous, of one shape and the transform's dtype, both are changed,
    and the result is one of them."""
    axis %= x.dim()
    columns = math.prod(x.shape[axis + 1 :])
    wide = (x.shape[axis], columns)
    if transform.before is not None:
        x.view(-1, *wide).mul_(transform.before[:, None])
    if columns == 1:
        done = _rows(x.view(-1, transform.block), transform.matrices, (spare.view(-1), x.view(-1)))
    else:
        done = _columns(x.view(-1, *wide), transform.matrices, (spare.view(-1), x.view(-1)))
    if transform.after is not None:
        done.view(-1, *wide).mul_(transform.after[:, None])
    return done.view(x.shape)


def _rows(x: Tensor, matrices: Sequence[Tensor], to: Sequence[Tensor | None]) -> Tensor:
    """Each row of `x` [R, n] transformed; by turns in the flat tensors `to`, a new one for None."""
    rows, n = x.shape
    if len(matrices) == 1:
        return torch.mm(x, matrices[0].T, out=None if to[0] is None else to[0].view(rows, n))
    for i, matrix in enumerate(reversed(matrices)):
        r, out = matrix.shape[0], to[i % 2]
        batch, turned = matrix.expand(rows, r, r), x.view(rows, n // r, r).transpose(1, 2)
        x = torch.bmm(batch, turned, out=None if out is None else out.view(rows, r, n // r)).view(rows, n)
    return x


def _columns(x: Tensor, matrices: Sequence[Tensor], to: Sequence[Tensor | None] = (None, None)) -> Tensor:
    """The middle axis of contiguous `x` [A, n, M] transformed; in the tensors `to` as `_rows`."""
    shape, inner = x.shape, x.shape[2]
    for i, matrix in enumerate(reversed(matrices)):
        r, out = matrix.shape[0], to[i % 2]
        stacked = x.view(-1, r, inner)
        x = torch.bmm(
            matrix.expand(stacked.shape[0], r, r), stacked, out=None if out is None else out.view(stacked.shape)
        )
        inner *= r
    return x.view(shape)


def _pieces(total: int, size: int) -> Iterator[tuple[int, int]]:
    return ((start, min(start + size, total)) for start in range(0, total, size))


def _size(x: Tensor) -> int:
    return _PIECE * torch.get_num_threads() if x.device.type == "cpu" else _ELSEWHERE
