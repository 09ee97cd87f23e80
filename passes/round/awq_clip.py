"""Round weights to nearest, in ranges that cost the layer's outputs least.

    s = max|w| / q_max   ⟶   s = c · max|w| / q_max        c = argmin δᵀ H δ over 1, 0.95, … 0.55; δ = Q(w) - w

Not exact: it is the rounding. H = Σ x̂ x̂ᵀ over calibration tokens, the block of it at the inputs that share a scale.
AWQ's second half (Lin et al. 2023, arXiv 2306.00978, and its authors' code); `awq-scale` is the first.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.errors import RecipeError
from qcompile.pass_base import register
from qcompile.passes.round.rounding import Rounding
from qcompile.rounding import AwqClip, Method, Nearest


@register
@dataclass(frozen=True)
class AwqClipPass(Rounding):
    """Choose a range for every scale of the weights that `insert-qdq` marked, and round them to nearest.

    Args:
        steps: ranges go down from the whole by 1 / steps.
        tried: how many are tried, the whole one among them.
        queries_keys: weights that make queries and keys are clipped, too. A layer's own output tells little of what
            clipping does to attention scores, so that their ranges stay as they are otherwise.
        safe, magr, accumulator_…: see `Rounding`.
    """

    name: ClassVar[str] = "awq-clip"

    steps: int = 20
    tried: int = 10
    queries_keys: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.tried <= self.steps:
            raise RecipeError(f"awq-clip: tried={self.tried} of steps={self.steps}; use 1 … steps, as 10 of 20")

    @property
    def clipping(self) -> AwqClip | None:
        """As `steps` and `tried` say."""
        return AwqClip(self.steps, self.tried)

    @property
    def clips_scores(self) -> bool:
        """As `queries_keys` says."""
        return self.queries_keys

    def method(self) -> Method:
        """To nearest."""
        return Nearest()
