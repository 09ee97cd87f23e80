"""Sums over tokens of products of features, block by block: Σ x xᵀ, of which half is enough, and Σ x̂ xᵀ."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from qcompile.linalg import product

STRIPS, STRIP = 16, 256
"""A symmetric product is computed in so many strips, 17/32 of the whole, or in fewer that are at least so wide."""
_FEW = 128


def add(hessian: Tensor, cross: Tensor | None, rows: Tensor, others: Tensor | None) -> None:
    """`add_gram` of `rows` [tokens, features], and `add_cross` where `others` are given."""
    add_gram(hessian, rows)
    if cross is not None and others is not None:
        add_cross(cross, rows, others)


def add_gram(sums: Tensor, rows: Tensor) -> None:
    """``sums += rowsᵀ rows``, but for what stands above the strips' diagonal blocks; `mirror` fills that in."""
    turned = rows.T.contiguous()
    for low, high in strips(len(sums)):
        sums[low:high, :high] += product(turned[low:high], turned[:high].T)


def add_cross(sums: Tensor, rows: Tensor, others: Tensor) -> None:
    """``sums += rowsᵀ others``."""
    sums += product(rows.T, others)


def mirror(sums: Tensor) -> None:
    """Make what `add_gram` added up symmetric."""
    for low, high in strips(len(sums)):
        sums[:low, low:high] = sums[low:high, :low].T


def column_sums(rows: Tensor) -> Tensor:
    """Sums over tokens, float64 ``[features]``: a few rows in their own dtype, those sums in float64."""
    return torch.stack([few.sum(0) for few in torch.split(rows, _FEW)]).sum(0, dtype=torch.float64)


def strips(size: int) -> Iterator[tuple[int, int]]:
    """Where each strip begins and ends."""
    count = max(1, min(STRIPS, size // STRIP))
    return itertools.pairwise(size * i // count for i in range(count + 1))
