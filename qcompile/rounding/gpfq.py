"""GPFQ: each column is rounded to what brings the running output closest to the float one's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.linalg import product
from qcompile.rounding.method import Problem, Sums
from qcompile.rounding.order import Order


@dataclass(frozen=True)
class GPFQ:
    """Greedy path following (Zhang, Zhou, Saab, arXiv 2201.11113): with u what the columns so far still owe,

        q_t = Q(⟨X̂_t, u + w_t X_t⟩ / ‖X̂_t‖²),    u ← u + w_t X_t - q_t X̂_t

    In Gram form, with H = X̂X̂ᵀ and G = X̂Xᵀ, x_t = (Σ_{k≤t} G_tk w_k - Σ_{k<t} H_tk q_k) / H_tt. So the anchor is w,
    M = stril(H) / diag(H), and the base w + tril(G - H) w / diag(H). Without the float stream G is H. Nothing is
    factored, so there is no damping.
    """

    follows_float: ClassVar[bool] = True

    order: Order = "none"

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """See `Method`."""
        diagonal = sums.hessian.diagonal()
        inverse = torch.where(diagonal == 0, 0, 1 / diagonal).unsqueeze(1)
        living = sums.alive(columns)
        base = living
        if sums.cross is not None:
            base = living + product((sums.cross - sums.hessian).tril_().mul_(inverse), columns)
        return Problem(base, living, sums.hessian.tril(-1).mul_(inverse), None)
