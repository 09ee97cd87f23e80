"""Qronos: the first column corrects the past in one step, the others follow the optimum that it leaves."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompile.rounding.float_target import float_target
from qcompile.rounding.method import Problem, Sums
from qcompile.rounding.order import Order
from qcompile.rounding.spectrum import largest_eigenvalue


@dataclass(frozen=True)
class Qronos:
    """Alternate (arXiv 2505.11695, algorithm 1): q_t is the best value for column t with the later ones as they are,
    and then those are moved to the least-squares optimum of ‖WX - (q, w)X̂‖² that the rounded ones leave.

    From the second column on "as they are" is that optimum, so x_t is GPTQ's from W* (see `FloatTarget`, drawn toward
    the weight). The first has the weights beside it: x_1 = ((G w)_1 - Σ_{k>1} H_1k w_k) / H_11. So base is W* but for
    its first column, the anchor is W*.

    `alpha`: λ over the largest eigenvalue of H.
    """

    follows_float: ClassVar[bool] = True

    order: Order = "none"
    alpha: float = 1e-6

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """See `Method`."""
        cross, hessian = sums.needed_cross(self), sums.hessian
        factored = sums.factor(self.alpha, largest_eigenvalue(hessian))
        target = float_target(columns, cross, factored, "weight")
        base = target.clone()
        if not bool(factored.dead[0]):
            owed = cross[0] @ columns - hessian[0, 1:] @ columns[1:]
            base[0] = owed / hessian[0, 0]
        return Problem(base, target, factored.feedback, factored)
