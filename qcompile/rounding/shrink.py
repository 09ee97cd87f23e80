"""How far to pull in the largest entries of rows: projections onto ℓ1 balls, and their duals."""

from __future__ import annotations

import torch
from torch import Tensor


def l1_threshold(magnitudes: Tensor, radius: float) -> Tensor:
    """θ ≥ 0 with Σ max(m - θ, 0) = `radius` for each row m ≥ 0 of `magnitudes` [..., n]; 0 where Σ m is within it.

    Soft thresholding by θ projects a row onto the ℓ1 ball of that radius (Duchi et al. 2008), and clipping at θ is the
    proximal step of radius · ‖·‖∞. Newton's steps from below: each drops entries that are under θ, until none is left.
    """
    count = torch.full_like(magnitudes[..., 0], magnitudes.shape[-1])
    theta = ((magnitudes.sum(-1) - radius) / count).clamp_(min=0)
    while True:
        over = magnitudes > theta.unsqueeze(-1)
        left = over.sum(-1).to(magnitudes.dtype)
        if bool((left == count).all()):
            return theta
        # Rows inside the ball have θ = 0 and keep it.
        moved = ((magnitudes * over).sum(-1) - radius) / left.clamp(min=1)
        theta, count = torch.maximum(theta, moved), left
