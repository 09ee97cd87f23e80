"""AWQ's clipping: how much of each group's range to give up, judged by the layer's outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.rounding.grid import Grid, Stored


@dataclass(frozen=True)
class AwqClip:
    """Search a smaller range for each scale (arXiv 2306.00978, and its authors' code): clamp its weights to
    ±(1 - i / steps) of their largest magnitude for i = 0 … tried - 1, round, and keep what moves the outputs least.

    A group's error is Σ δᵀ H_gg δ over the rows that share the scale, with H_gg the block of H at its inputs.
    """

    steps: int = 20
    tried: int = 10

    def ranges(self, columns: Tensor, hessian: Tensor, stored: Stored, outer: tuple[Tensor, ...]) -> Tensor:
        """`columns` [in, out] clamped: parameters are to be chosen from them, the weights themselves stay."""
        rows, groups = stored.scales
        width = len(columns) // groups
        # [groups, inputs of a group, scales along out, rows of a scale]
        shape = (groups, width, rows, -1)
        blocks = hessian.view(groups, width, groups, width).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
        peaks = columns.view(shape).abs().amax((1, 3), keepdim=True)
        best, least = columns, torch.full_like(peaks, torch.inf)
        for i in range(self.tried):
            limit = peaks * (1 - i / self.steps)
            clamped = torch.minimum(torch.maximum(columns.view(shape), -limit), limit)
            rounded = Grid.fit(clamped.view_as(columns).t(), stored, outer).round(columns, slice(None))
            wrong = (rounded - columns).view(groups, width, -1)
            error = (torch.bmm(blocks, wrong) * wrong).view(shape).sum((1, 3), keepdim=True)
            better = error < least
            best = torch.where(better, clamped, best.view(shape)).view_as(columns)
            least = torch.where(better, error, least)
        return best
