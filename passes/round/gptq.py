"""Round weights so that each error is made up for by the weights that are not rounded yet.

    q_j = Q(w_j + Σ_{k<j} (w_k - q_k) R_kj / R_jj)        R Rᵀ = H + λI,  H = Σ x̂ x̂ᵀ over calibration tokens

Not exact: it is the rounding. With `target: float`, w is first replaced by W* = W Gᵀ H⁻¹, G = Σ x̂ xᵀ, whose outputs
on the rounded model's inputs x̂ are nearest to those of the float model. Frantar et al. 2022 (arXiv 2210.17323), in the
form of arXiv 2507.18553.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompile.pass_base import register
from qcompile.passes.round.compensating import Compensating
from qcompile.rounding import GPTQ, FloatTarget, Method


@register
@dataclass(frozen=True)
class Gptq(Compensating):
    """GPTQ for every weight that `insert-qdq` marked, in any format.

    Args:
        damping: λ over the mean of H's diagonal; raised tenfold, and told, where H has no factorisation with it.
        target: ``quantized`` for the outputs that float weights have on what the rounded model feeds them, ``float``
            for those of the float model.
        safe, magr, accumulator_…: see `Rounding`.
        act_order, static_groups, clip: see `Compensating`.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.01
    target: Literal["quantized", "float"] = "quantized"

    def method(self) -> Method:
        """GPTQ, from the weights or from W*."""
        return (FloatTarget if self.target == "float" else GPTQ)(self.damping, self.order)
