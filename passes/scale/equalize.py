"""Even out the ranges of weights before and after each channel.

    z = linear(relu(linear(x, W1)), W2)      ⟶      z = linear(relu(linear(x, diag(s)·W1)), W2·diag(1/s))

    s_j = √(r_j(W2) / r_j(W1))      r_j: the range of row j of W1, of column j of W2

Exact. Afterwards both ranges are √(r_j(W1)·r_j(W2)). It needs no data. Through ReLU, from linear to linear, from values
to output projection, from up- to down-projection, between queries and keys. Nagel et al. 2019, "Data-Free Quantization
Through Weight Equalization and Bias Correction", section 4.1, with s in place of its 1/s.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.scale.ranges import Measure, Sides, Simulation, sides_of
from qcompile.passes.scale.readers import tell_left_alone
from qcompile.progress import track
from qcompile.spaces import Level, Space, channel_spaces
from qcompile.spaces.apply import Edits
from qcompile.spaces.show import account, describe, left_alone


@register
@dataclass(frozen=True)
class Equalize(Pass):
    """Scale every channel so that the weights that make it and those that read it have one range.

    Where several weights make or read a channel, the largest range counts. A weight in two spaces, as those in the
    middle of a chain, is why it goes round until nothing moves.

    Args:
        iterations: rounds over all spaces, at most.
        tolerance: stop when no factor of a round is further than this from 1, in |ln s|.
        measure: the range of a row or column: its largest magnitude, or its root mean square.
        norms: let gains of norms, which stay float, count as weights that make channels; otherwise a space that
            nothing else makes is left alone.
        bound: no channel is multiplied or divided by more in all.

    Raises RecipeError for fewer than one iteration, a negative tolerance, or a bound below 1.
    """

    name: ClassVar[str] = "equalize"

    iterations: int = 20
    tolerance: float = 1e-3
    measure: Measure = "absmax"
    norms: bool = False
    bound: float = 1e4

    def run(self, program: Program) -> Report:
        """Equalize every diagonal space between weights; the products that read none are reported with the reason."""
        if self.iterations < 1 or not self.tolerance >= 0 or not 1 <= self.bound < float("inf"):
            raise RecipeError(f"pass {self}: give iterations >= 1, tolerance >= 0 and a finite bound >= 1")
        report, spaces = Report(), channel_spaces(program)
        found, reasons = sides_of(program, spaces[Level.DIAGONAL], self.norms)
        state = Simulation(program, self.measure)
        totals = [torch.ones(sides.space.width, dtype=torch.float64) for sides in found]
        change, rounds = 0.0, 0
        for _ in track(range(self.iterations), "equalizing"):
            rounds, moved = rounds + 1, [self._improve(state, *pair) for pair in zip(found, totals, strict=True)]
            change = max(moved, default=0.0)
            if change <= self.tolerance:
                break
        edits, fates = Edits(spaces, report), {}
        for sides, total in zip(found, totals, strict=True):
            edits.scale(sides.space, total)
            least, most = float(total.min()), float(total.max())
            report.rewrote(sides.space.name, f"{sides.space.width} channels times {least:.3g} to {most:.3g}")
            report.measure(sides.space.name, {"least": least, "most": most})
            fates[sides.space] = f"equalized between {len(sides.counted)} weights"
        for space in spaces[Level.DIAGONAL]:
            if space not in fates:
                fates[space] = left_alone(_why(space, reasons))
        report.spaces = account(spaces, describe(spaces), Level.DIAGONAL, fates)
        edits.commit()
        tell_left_alone(spaces, find_contractions(program), [s.space for s in found], reasons, report)
        report.note(f"{rounds} rounds; the last one moved ln s by {change:.1e} at most")
        return report

    def _improve(self, state: Simulation, sides: Sides, total: Tensor) -> float:
        """One step of one space, added to its `total`; how far it was, in |ln s|."""
        wanted = (total * state.step(sides)).clamp(1 / self.bound, self.bound)
        step = wanted / total
        state.scale(sides, step)
        total.copy_(wanted)
        return float(step.log().abs().max())


def _why(space: Space, reasons: Mapping[fx.Node, str]) -> str:
    """Why a space that may be scaled is not equalized."""
    return next((reasons[p.node] for p in space.sinks if p.node in reasons), "no product reads it")
