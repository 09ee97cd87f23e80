"""GPTAQ: GPTQ that also makes up, column by column, for what the float stream's inputs were."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompile.linalg import solve_lower, solve_upper
from qcompile.rounding.method import Problem, Sums
from qcompile.rounding.order import Order


@dataclass(frozen=True)
class GPTAQ:
    """Asymmetric calibration (arXiv 2504.02692, algorithm 1). With U the upper Cholesky factor of (H + λI)⁻¹ = UᵀU and
    P = α striu(ΔX X̂ᵀ Uᵀ) U for ΔX = X - X̂, each rounded column k moves the later ones by

        x_j ← x_j - (x_k - q_k) U_kj / U_kk + x_k P_kj

    That is linear in w and q. With H + λI = LᵀDL (L unit lower: `factor`'s I + M₀, D its pivots), U is D^-½ L⁻ᵀ, and
    Pᵀ = α L⁻¹ S for S = D⁻¹ stril(L⁻ᵀ (G - H)). Collecting, L⁻¹ (I - αS) x = w - (I - L⁻¹) q, so

        base = (I - αS)⁻¹ w,    M = (I - αS)⁻¹ M₀,    anchor = w

    `alpha`: the share of the correction that is made; 0.25 in the authors' code. `damping`: λ over the mean diagonal.
    """

    follows_float: ClassVar[bool] = True

    damping: float = 0.01
    order: Order = "none"
    alpha: float = 0.25

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """See `Method`."""
        factored = sums.factor(self.damping)
        moved = sums.needed_cross(self) - sums.hessian
        shift = solve_upper(factored.feedback.t(), moved, unit=True)
        shift.tril_(-1).mul_(-self.alpha / factored.pivots.unsqueeze(1))
        living = sums.alive(columns)
        base = solve_lower(shift, living, unit=True)
        within = factored.feedback.tril(-1)
        feedback = solve_lower(shift, within, unit=True)
        return Problem(base, living, feedback, factored)
