"""Round weights so that each error is made up for by the weights that are not rounded yet.

    q_j = Q(w_j + Σ_{k<j} (w_k - q_k) R_kj / R_jj)        R Rᵀ = H + λI,  H = Σ x̂ x̂ᵀ over calibration tokens

Not exact: it is the rounding. With `target: float`, w is first replaced by W* = W Gᵀ H⁻¹, G = Σ x̂ xᵀ, whose outputs
on the rounded model's inputs x̂ are nearest to those of the float model. Frantar et al. 2022 (arXiv 2210.17323), in the
form of arXiv 2507.18553.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompile.errors import RecipeError
from qcompile.pass_base import register
from qcompile.passes.round.rounding import Rounding
from qcompile.rounding import GPTQ, FloatTarget, Method, Order
from qcompile.rounding.solve import Groups


@register
@dataclass(frozen=True)
class Gptq(Rounding):
    """GPTQ for every weight that `insert-qdq` marked, in any format.

    Args:
        damping: λ over the mean of H's diagonal; raised tenfold, and told, where H has no factorisation with it.
        act_order: columns by falling diagonal of H; ``group``: groups so, and columns inside them, which stay together.
        static_groups: scales are chosen before the first column is rounded; else each group's when its turn comes,
            from the columns as they are by then (not with ``act_order: true``).
        target: ``quantized`` for the outputs that float weights have on what the rounded model feeds them, ``float``
            for those of the float model.
        safe: see `Rounding`.
    """

    name: ClassVar[str] = "gptq"

    damping: float = 0.01
    act_order: bool | Literal["group"] = True
    static_groups: bool = True
    target: Literal["quantized", "float"] = "quantized"

    def __post_init__(self) -> None:
        if self.act_order is True and not self.static_groups:
            raise RecipeError("gptq: act_order=true needs static_groups=true; or take act_order=group")

    @property
    def groups(self) -> Groups:
        """As `static_groups` says."""
        return "static" if self.static_groups else "running"

    def method(self) -> Method:
        """GPTQ, from the weights or from W*."""
        order: Order = "act" if self.act_order is True else "group" if self.act_order == "group" else "none"
        return (FloatTarget if self.target == "float" else GPTQ)(self.damping, order)
