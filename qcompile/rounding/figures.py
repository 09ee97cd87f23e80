"""What rounding a matrix cost, in numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.linalg import product

BLOCK = 256


@dataclass(frozen=True)
class Figures:
    """How a matrix was rounded, and at what error. All plain values.

    `loss` and `rtn_loss`: tr(ΔW H ΔWᵀ) / tr(W H Wᵀ) of the result and of rounding to nearest. `gap` and `rtn_gap`,
    where the float stream's inputs are known: (‖WX - ŴX̂‖² - ‖WX - WX̂‖²) over the same tr(W H Wᵀ), below 0 where Ŵ makes
    up for errors of its inputs; `error` and `rtn_error`: ‖WX - ŴX̂‖² / ‖WX‖², where the power of the float outputs is
    known as well. `damping` is None where the method has none; `tried` are the dampings until one worked. `fell_back`:
    why the result is that of rounding to nearest after all, or None.
    """

    method: str
    tokens: int
    dead: int
    damping: float | None
    tried: tuple[float, ...]
    loss: float
    rtn_loss: float
    gap: float | None
    rtn_gap: float | None
    error: float | None
    rtn_error: float | None
    fell_back: str | None


def quadratics(several: Sequence[Tensor], symmetric: Tensor) -> list[float]:
    """tr(Eᵀ H E) for each E, all of one shape [n, m], and a symmetric H [n, n]; half the work of H @ E. In float64."""
    columns, totals = torch.cat(list(several), 1), [0.0] * len(several)
    for start in range(0, len(columns), BLOCK):
        stop = min(start + BLOCK, len(columns))
        here = columns[start:stop]
        # Twice what is left of the diagonal block, and that block once.
        found = product(symmetric[start:stop, start:stop], here)
        if start:
            found.add_(product(symmetric[start:stop, :start], columns[:start]), alpha=2.0)
        for i, parts in enumerate(zip(here.chunk(len(several), 1), found.chunk(len(several), 1), strict=True)):
            totals[i] += dot(*parts)
    return totals


def dot(a: Tensor, b: Tensor) -> float:
    """Σ a·b over all entries: rows in their dtype, rows' sums in float64."""
    return float(torch.linalg.vecdot(a, b).sum(dtype=torch.float64))
