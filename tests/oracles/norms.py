"""Norms as their formula says."""

from __future__ import annotations

import torch


def rms(x: torch.Tensor, eps: float) -> torch.Tensor:
    """x / √(mean(x²) + ε) over the last axis, in x's dtype (Zhang and Sennrich 2019)."""
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt()
