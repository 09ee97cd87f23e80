"""Give what products read inside a block a few channels that outgrow the others.

    y = linear(x, W)                       y = linear(x, diag(s)·W)
    a = silu(g) · y               ⟶        a = silu(g) · y                s = gain at a few channels, else 1
    z = linear(a, V)                       z = linear(a, V·diag(1/s))

Exact in real arithmetic. Where operators carry a factor from one product to the next, as between the up- and the
down-projection or from the values to the output projection, head by head, both ends take it up.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.scale.readers import scalable, tell_left_alone
from qcompile.spaces import channel_spaces
from qcompile.spaces.apply import Edits


@register
@dataclass(frozen=True)
class InjectInputOutliers(Pass):
    """Scale a few channels between two products up where they are made, and down where they are read.

    Channels that a norm makes are for inject-outliers, those of the stream for inject-stream-outliers.

    Args:
        channels: how many channels of each space: of a hidden layer, or of all values of a layer.
        gain: their factor.
        seed: which channels.
    """

    name: ClassVar[str] = "inject-input-outliers"

    channels: int = 4
    gain: float = 30.0
    seed: int = 0

    def run(self, program: Program) -> Report:
        """Scale; the report has every product whose input stays as it is.

        Raises RecipeError for a gain that is not positive and finite, or fewer than one channel.
        """
        if self.channels < 1 or not 0 < self.gain < float("inf"):
            raise RecipeError(f"pass {self}: give at least one channel and a positive, finite gain")
        report, spaces, products = Report(), channel_spaces(program), find_contractions(program)
        reasons: dict[fx.Node, str] = {}
        edits, taken = Edits(spaces, report), []
        makers = {c.node for c in products}
        for found in scalable(program, spaces, reasons):
            space = found.space
            if any(p.node in makers for p in space.sources):
                scale = self._scale(space.width)
                found.divide(edits, scale.reciprocal())
                taken.append(space)
                chosen = scale.ne(1).nonzero().flatten().tolist()
                report.rewrote(space.name, f"channels {chosen} of {space.width} times {self.gain:g}")
            else:
                reasons |= {p.node: "no product makes what it reads" for p in space.sinks}
        tell_left_alone(spaces, products, taken, reasons, report)
        edits.commit()
        return report

    def _scale(self, width: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed)
        scale = torch.ones(width, dtype=torch.float64)
        scale[torch.randperm(width, generator=generator)[: self.channels]] = self.gain
        return scale
