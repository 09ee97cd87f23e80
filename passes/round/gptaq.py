"""Round weights as GPTQ does, and move those still to come towards what the float model's inputs ask for.

    x_j ← x_j - (x_k - q_k) U_kj / U_kk + x_k P_kj      UᵀU = (H + λI)⁻¹      P = α striu((G - H)ᵀ Uᵀ) U

Not exact: it is the rounding. H = Σ x̂ x̂ᵀ of the rounded model's inputs x̂, G = Σ x̂ xᵀ with those of the float model.
Li et al. 2025 (arXiv 2504.02692), algorithm 1; solved as one recursion, see `qcompile.rounding.GPTAQ`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.pass_base import register
from qcompile.passes.round.compensating import Compensating
from qcompile.rounding import GPTAQ, Method


@register
@dataclass(frozen=True)
class Gptaq(Compensating):
    """GPTAQ for every weight that `insert-qdq` marked, in any format.

    Args:
        damping: as in gptq.
        alpha: the share of the correction that is made at each column.
        safe, magr, accumulator_…: see `Rounding`.
        act_order, static_groups, clip: see `Compensating`.
    """

    name: ClassVar[str] = "gptaq"

    damping: float = 0.01
    alpha: float = 0.25

    def method(self) -> Method:
        """GPTAQ, in the order of its columns."""
        return GPTAQ(self.damping, self.order, self.alpha)
