"""Give each layer's bias what rounding took from the mean of its output.

    y = linear(x̂, Ŵ, b)   ⟶   y = linear(x̂, Ŵ, b + Δb)        Δb = W E[x] - Ŵ E[x̂]

x is of the float model, x̂ of the one that is quantized. Not exact, and on the calibration data's mean it is. A layer
without a bias gets one. Nagel et al. 2019 (arXiv 1906.04721), section 4.2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import fx

from qcompile.calibration.chain import Stage, Target
from qcompile.calibration.processes import Processes
from qcompile.calibration.statistics import Collector, Seen, Want
from qcompile.calibration.worker import SegmentPass, Setup, Solved, Worker
from qcompile.data.padding import Padding
from qcompile.errors import RecipeError
from qcompile.ir.bias import add_to_bias, bias_argument
from qcompile.ir.contractions import Contraction, find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import Report, register
from qcompile.passes.quantize.sites import weight_qdq


@register
@dataclass(frozen=True)
class BiasCorrection(SegmentPass):
    """Correct the bias of every product whose weight is rounded, once it is.

    Put it right behind the pass that rounds (gptq, …), whose run over the data it shares, or before `rtn`. Every stage
    is run once more for it. Raises RecipeError without ``true_sequential``: what a layer passed on would be made up for
    twice, by its own bias and by that of the next.
    """

    name: ClassVar[str] = "bias-correction"

    def begin(self, setup: Setup) -> Worker:
        """The worker for one run of the engine."""
        return BiasWorker(setup)


@dataclass(frozen=True)
class MeanWant:
    """The mean difference of one result of both programs, over tokens; features in `axis`."""

    value: fx.Node
    plain: fx.Node
    axis: int
    padding: Padding = field(compare=False)
    padding_float: Padding = field(compare=False)

    @property
    def quantized(self) -> tuple[str, ...]:
        return (self.value.name,)

    @property
    def float(self) -> tuple[str, ...]:
        return (self.plain.name,)

    def make(self) -> Means:
        return Means(self)


class Means:
    """The sum over tokens of what the float program has more."""

    def __init__(self, want: MeanWant) -> None:
        self.want, self.count = want, 0
        self.total = torch.zeros(want.value.meta["val"].shape[want.axis], dtype=torch.float64)

    def see(self, seen: Seen) -> None:
        """Take in a batch."""
        want = self.want
        ours = want.padding.tokens_of(want.value, seen.quantized[want.value.name], seen.mask)
        theirs = want.padding_float.tokens_of(want.plain, seen.float[want.plain.name], seen.mask)
        rows = (theirs.double() - ours.double()).movedim(want.axis, -1).reshape(-1, len(self.total))
        self.total += rows.sum(0).to(self.total.device)
        self.count += len(rows)

    def add_up(self, processes: Processes) -> None:
        """Take in what the other processes saw."""
        processes.add_up([self.total])
        self.count = processes.number(self.count)


class BiasWorker(Worker):
    """Settles a stage once its weights are rounded."""

    phase = 2
    needs_quantized = True
    needs_float = True

    def __init__(self, setup: Setup) -> None:
        if not setup.settings.true_sequential:
            raise RecipeError("bias-correction looks at layers one by one; take calibration.true_sequential=true")
        self.setup, self.report = setup, Report()
        program, plain = setup.program, {c.node.name: c for c in find_contractions(setup.plain)}
        marked = {node for place in weight_qdq(program) for node in place.dequantize}
        self.places: list[tuple[Contraction, Contraction, str]] = []
        for c in find_contractions(program):
            if marked.isdisjoint(c.path):
                continue
            reason = _obstacle(program, c, plain)
            if reason is not None:
                self.report.skip(c.node, reason)
            else:
                self.places.append((c, plain[c.node.name], program.key(c.weight)))
        if not marked:
            self.report.note("no weight is being rounded; put bias-correction behind gptq or the like, or before rtn")

    def targets(self) -> Sequence[Target]:
        """The products, as the pass that rounds their weights names them."""
        return [Target(plain.node, plain.input) for _, plain, _ in self.places]

    def wants(self, stage: Stage) -> Sequence[Want]:
        """Means of the results of this stage."""
        return [want for _, want in self._here(stage)]

    def solve(self, stage: Stage, found: Mapping[Want, Collector], processes: Processes) -> Solved:
        """What each bias is to gain."""
        solved = Solved()
        for number, want in self._here(stage):
            means = found[want]
            assert isinstance(means, Means)
            solved.tensors[str(number)] = (means.total / max(1, means.count)).cpu()
        return solved

    def apply(self, stage: Stage, solved: Solved) -> None:
        """Add it."""
        for number, gain in solved.tensors.items():
            c, _, key = self.places[int(number)]
            what = add_to_bias(self.setup.program, c, gain)
            self.report.rewrote(c.node, what)
            self.report.measure(key, {"bias_moved": float(gain.square().mean().sqrt())})

    def finish(self) -> Report:
        """The report; a product that no stage reached stands in it."""
        done = {entry.where for entry in self.report.rewritten}
        self.report.note(f"{len(done)} biases corrected")
        return self.report

    def _here(self, stage: Stage) -> list[tuple[int, MeanWant]]:
        there, setup = {target.at for target in stage.targets}, self.setup
        return [
            (number, MeanWant(c.node, plain.node, c.output_axis, setup.padding, setup.padding_float))
            for number, (c, plain, _) in enumerate(self.places)
            if plain.node in there
        ]


def _obstacle(program: Program, c: Contraction, plain: Mapping[str, Contraction]) -> str | None:
    if c.node.name not in plain:
        return "it is no product with a weight in the float program"
    if c.experts is not None:
        return "experts have no bias of their own to correct"
    name = bias_argument(c)
    if name is None:
        return f"{c.op} takes no bias"
    held = program.arg(c.node, name)
    if isinstance(held, fx.Node) and (not program.is_weight(held) or len(held.users) > 1):
        return f"its bias {held.name} is computed or shared"
    return None
