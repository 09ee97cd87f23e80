"""Put the channels of each space in the order of a score.

    W_source ← rows in order        W_sink ← columns in order          channel j becomes what channel order[j] was

Exact: sums over channels run in another order. Along a sink's input axis quantization groups are then made of channels
that are alike, and nothing is gathered when the model runs. ``arrange=even`` does the opposite, for blocks that are
rotated or whose scales must agree: it deals the channels out, so that each run of `group` gets large and small ones.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.permute.arrange import Arrange, Arrangement, arrange, channels, weight_columns
from qcompile.passes.permute.kinds import Kind
from qcompile.spaces import Placement, channel_spaces

_ROWS = 1024  # of a weight that are looked at together


@register
@dataclass(frozen=True)
class Permute(Pass):
    """Order channels by the weights that read them.

    Args:
        score: a column's largest magnitude, or its Euclidean norm; of several sinks, the largest or that of them all.
        stream, heads, hidden: which channels: of residual streams, inside attention's heads, between a product and the
            next one.
        arrange: ``sorted``, or ``even``: dealt out over runs of `group` channels.
        group: channels in a run, for ``even``.
        descending: from the largest score to the smallest.

    Raises RecipeError where `group` is given without ``even``, or the other way round.
    """

    name: ClassVar[str] = "permute"
    score: Literal["range", "norm"] = "range"
    stream: bool = True
    heads: bool = True
    hidden: bool = True
    arrange: Arrangement = "sorted"
    group: int | None = None
    descending: bool = True

    def run(self, program: Program) -> Report:
        """Permute; the report has every space and every product whose input stays in its order, with the reason."""
        how = Arrange(wanted(self.stream, self.heads, self.hidden), self.arrange, self.group, self.descending)
        report = Report()

        def score(sink: Placement) -> Tensor:
            parts = torch.split(weight_columns(program, sink), _ROWS)
            if self.score == "range":
                return channels(torch.stack([_peaks(part) for part in parts]).amax(0), sink, "max")
            return channels(torch.stack([part.double().square().sum(0) for part in parts]).sum(0), sink, "sum")

        def combine(scores: list[Tensor]) -> Tensor:
            stacked = torch.stack(scores)
            return stacked.amax(0) if self.score == "range" else stacked.sum(0).sqrt()

        arrange(channel_spaces(program), how, score, combine, report)
        return report


def wanted(stream: bool, heads: bool, hidden: bool) -> tuple[Kind, ...]:
    """The kinds of spaces that are chosen."""
    given: dict[Kind, bool] = {"stream": stream, "heads": heads, "hidden": hidden}
    return tuple(kind for kind, chosen in given.items() if chosen)


def _peaks(rows: Tensor) -> Tensor:
    """max |w| of each column; 0 of a weight without rows."""
    return rows.abs().amax(0) if len(rows) else rows.new_zeros(rows.shape[1])
