"""GPTQ: each column is rounded where its error and those before it cost the layer's output least."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompile.rounding.method import Problem, Sums
from qcompile.rounding.order import Order


@dataclass(frozen=True)
class GPTQ:
    """Minimise ‖(W - Ŵ)X̂‖², column by column (arXiv 2210.17323), in the LDLQ form (arXiv 2507.18553): with
    H + λI = R Rᵀ, x_j = w_j + Σ_{k<j} (w_k - q_k) R_kj / R_jj. Base and anchor are W; see `factor`.

    The same numbers come from the Cholesky factor U of (H + λI)⁻¹ = UᵀU, for U = R⁻¹ row by row.
    `damping`: λ over the mean diagonal.
    """

    follows_float: ClassVar[bool] = False

    damping: float = 0.01
    order: Order = "none"

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """See `Method`."""
        factored = sums.factor(self.damping)
        living = sums.alive(columns)
        return Problem(living, living, factored.feedback, factored)
