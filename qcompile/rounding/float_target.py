"""GPTQ towards the float stream's output, in closed form."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile.linalg import product
from qcompile.rounding.factor import Factored
from qcompile.rounding.method import Problem, Sums
from qcompile.rounding.order import Order

Toward = Literal["weight", "zero"]


@dataclass(frozen=True)
class FloatTarget:
    """Minimise ‖WX - ŴX̂‖²: with H = X̂X̂ᵀ and G = X̂Xᵀ its unrounded solution is W* = W Gᵀ H⁻¹, and the error of any Ŵ
    is that of W* plus tr((W* - Ŵ) H (W* - Ŵ)ᵀ). So GPTQ is run from W*: base and anchor are W*.

    Damped: H W*ᵀ + λ(W* - A)ᵀ = G Wᵀ, where A, what little-used directions are drawn `toward`, is the weight (so that
    W* is W where X̂ = X) or zero. `damping`: λ over the mean diagonal of H, as in GPTQ.
    """

    follows_float: ClassVar[bool] = True

    damping: float = 0.01
    order: Order = "none"
    toward: Toward = "weight"

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """See `Method`."""
        factored = sums.factor(self.damping)
        target = float_target(columns, sums.needed_cross(self), factored, self.toward)
        return Problem(target, target, factored.feedback, factored)


def float_target(columns: Tensor, cross: Tensor, factored: Factored, toward: Toward) -> Tensor:
    """W*ᵀ [in, out] for Wᵀ `columns` [in, out] and G `cross` [in, in]; 0 where the input is dead."""
    right = product(cross, columns)
    if toward == "weight":
        right.add_(columns, alpha=factored.ridge)
    found = factored.solve(right)
    return torch.where(factored.dead.unsqueeze(1), 0, found)
