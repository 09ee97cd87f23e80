"""MagR: weights with smaller peaks and nearly the same outputs, before they are rounded."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.linalg import product
from qcompile.rounding.shrink import l1_threshold
from qcompile.rounding.spectrum import largest_eigenvalue


@dataclass(frozen=True)
class MagR:
    """Weight magnitude reduction (arXiv 2406.00800): min over V of ½ ‖(V - W)X̂‖² + α Σ ‖v‖∞, v each run of weights that
    shares a scale in a row, by proximal gradient steps

        V ← prox(V - (V - W) H / λ_max),    prox clips each v at the θ with Σ max(|v| - θ, 0) = α

    H is taken in units of its largest eigenvalue, `alpha` in those of the weights.
    """

    alpha: float = 0.01
    steps: int = 200

    def shrunk(self, columns: Tensor, hessian: Tensor, groups: int) -> Tensor:
        """The new columns [in, out] for Wᵀ `columns`, H [in, in] and `groups` equal runs of inputs."""
        largest = largest_eigenvalue(hessian)
        if largest == 0.0:
            return columns
        target, found = columns.t().contiguous(), columns.t().clone()
        shape = (len(found), groups, -1)
        for _ in range(self.steps):
            found = found.sub(product(found - target, hessian), alpha=1 / largest)
            peaks = l1_threshold(found.view(shape).abs(), self.alpha).unsqueeze(-1)
            found = torch.minimum(torch.maximum(found.view(shape), -peaks), peaks).view(found.shape)
        return found.t().contiguous()
