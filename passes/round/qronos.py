"""Round weights towards the float model's outputs: correct the past in the first column, then spread each error.

    x_1 = ((G w)_1 - Σ_{k>1} H_1k w_k) / H_11       x_j = w*_j + Σ_{k<j} M_jk (w*_k - q_k)       w* = (H + λI)⁻¹ G w

Not exact: it is the rounding. H = Σ x̂ x̂ᵀ of the rounded model's inputs x̂, G = Σ x̂ xᵀ with those of the float model, M
the feedback of GPTQ. Zhang et al. 2025 (arXiv 2505.11695), algorithm 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.pass_base import register
from qcompile.passes.round.compensating import Compensating
from qcompile.rounding import Method, Qronos


@register
@dataclass(frozen=True)
class QronosPass(Compensating):
    """Qronos for every weight that `insert-qdq` marked, in any format.

    Args:
        alpha: λ over the largest eigenvalue of H.
        safe, magr, accumulator_…: see `Rounding`.
        act_order, static_groups, clip: see `Compensating`.
    """

    name: ClassVar[str] = "qronos"

    alpha: float = 1e-6

    def method(self) -> Method:
        """Qronos, in the order of its columns."""
        return Qronos(self.order, self.alpha)
