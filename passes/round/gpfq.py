"""Round weights so that the layer's output follows the float model's, column after column.

    q_t = Q((Σ_{k≤t} G_tk w_k - Σ_{k<t} H_tk q_k) / H_tt)

Not exact: it is the rounding. H = Σ x̂ x̂ᵀ of the rounded model's inputs x̂, G = Σ x̂ xᵀ with those of the float model. A
column makes up for those before it and leaves later weights where they are, so that nothing is factored. Zhang, Zhou,
Saab 2023 (arXiv 2201.11113).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.pass_base import register
from qcompile.passes.round.compensating import Compensating
from qcompile.rounding import GPFQ, Method


@register
@dataclass(frozen=True)
class Gpfq(Compensating):
    """GPFQ for every weight that `insert-qdq` marked, in any format.

    Args:
        safe, magr, accumulator_…: see `Rounding`.
        act_order, static_groups, clip: see `Compensating`.
    """

    name: ClassVar[str] = "gpfq"

    def method(self) -> Method:
        """GPFQ, in the order of its columns."""
        return GPFQ(self.order)
