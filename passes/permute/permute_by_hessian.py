"""Put the channels of each space in the order of their second moment on calibration data.

    W_source ← rows in order        W_sink ← columns in order          order: by diag(XᵀX) of what the sinks read

Exact: sums over channels run in another order. GPTQ (Frantar et al. 2023, "act-order") rounds the columns of a weight
in this order, and pays for it with groups that are scattered over the columns; here the channels themselves are moved,
so groups stay contiguous and nothing is gathered when the model runs.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.data.batches import Batch, feeds, token_mask, tokens_in
from qcompile.data.padding import Padding
from qcompile.errors import QCompileError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.permute.arrange import Arrange, Arrangement, arrange, channels
from qcompile.passes.permute.permute import wanted
from qcompile.progress import track
from qcompile.spaces import Placement, channel_spaces


@register
@dataclass(frozen=True)
class PermuteByHessian(CalibratedPass):
    """Order channels by the diagonal of the Hessian of the products that read them.

    Of several sinks, each one's diagonal counts relative to its own mean, and the largest decides.

    Args:
        stream, heads, hidden, arrange, group, descending: as in permute.

    Raises RecipeError as permute does, QCompileError for data without tokens.
    """

    name: ClassVar[str] = "permute-by-hessian"
    preserves_function: ClassVar[bool] = True
    stream: bool = True
    heads: bool = True
    hidden: bool = True
    arrange: Arrangement = "sorted"
    group: int | None = None
    descending: bool = True

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        """Run the batches once, then permute; the report is that of permute."""
        how = Arrange(wanted(self.stream, self.heads, self.hidden), self.arrange, self.group, self.descending)
        report = Report()
        diagonals = second_moments(program, batches, report)

        def score(sink: Placement) -> Tensor:
            return channels(diagonals[sink.node], sink, "sum")

        def combine(scores: list[Tensor]) -> Tensor:
            return torch.stack([s / s.mean().clamp(min=torch.finfo(s.dtype).tiny) for s in scores]).amax(0)

        arrange(channel_spaces(program), how, score, combine, report)
        return report


def second_moments(program: Program, batches: Iterable[Batch], report: Report) -> dict[fx.Node, Tensor]:
    """For each product with a weight, diag(XᵀX) over all its input's tokens: float64 [input features].

    Padding is left out; the report is told where it could not be.

    Raises QCompileError for data without tokens.
    """
    products = find_contractions(program)
    inputs: dict[fx.Node, set[int]] = {}
    for c in products:
        inputs.setdefault(c.input, set()).add(c.input_axis)
    sums: dict[tuple[fx.Node, int], Tensor] = {}

    def observe(node: fx.Node, value: Any, mask: Tensor | None) -> None:
        for axis in inputs.get(node, ()):
            rows = padding.tokens_of(node, value.detach(), mask).double().movedim(axis, -1).flatten(0, -2)
            found = rows.square().sum(0)
            sums[node, axis] = sums[node, axis] + found if (node, axis) in sums else found

    tokens, padding = 0, Padding(program)
    for batch in track(batches, "looking at channels"):
        run(program, fill(program, feeds(batch)), partial(observe, mask=token_mask(batch)))
        tokens += tokens_in(batch)
    for note in padding.notes():
        report.note(note)
    if not tokens:
        raise QCompileError("the calibration data has no tokens; give data= with at least one batch")
    return {c.node: sums[c.input, c.input_axis] for c in products}
