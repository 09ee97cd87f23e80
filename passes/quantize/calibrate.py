"""Fix the scales of static activations from calibration data.

    p = choose_qparams(x, "… static"); s, z = p  ⟶  s, z are weights <module>.input.scale and <module>.input.zero_point

(`<module>.output.scale` for a result, and so on: what the value is to the module.) The ranges are those of the float
program: weights and activations are not rounded while it is watched. Memory is that of one segment, one observer a
place, and the values between segments. Where the program chooses among experts, how many tokens each of them saw is
counted along the way.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from torch import Tensor, fx

from qcompile.calibration.chain import Stage, Target
from qcompile.calibration.processes import Processes
from qcompile.calibration.statistics import Collector, Seen, Want
from qcompile.calibration.worker import SegmentPass, Setup, Solved, Worker
from qcompile.data.padding import Padding
from qcompile.errors import QCompileError, SpecError
from qcompile.ir.program import Program
from qcompile.numerics.element import IntElement
from qcompile.numerics.observers import Observer
from qcompile.numerics.parameters import QParams, outer_names
from qcompile.numerics.scaling import to_steps
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report, register
from qcompile.passes.quantize.plain import decoders
from qcompile.passes.quantize.routing import RoutingCounts
from qcompile.passes.quantize.sites import QDQ, find_qdq, free_key, replace_by_weight


@register
@dataclass(frozen=True)
class Calibrate(SegmentPass):
    """Watch static activations on the batches and store their scales.

    Raises QCompileError for data without tokens, and for a nan or infinity with the module and the samples.
    """

    name: ClassVar[str] = "calibrate"

    def begin(self, setup: Setup) -> Worker:
        return CalibrateWorker(setup)


@dataclass(frozen=True)
class RangeWant:
    """The range of one value of the float program."""

    value: fx.Node
    spec: QuantSpec
    where: str = field(compare=False)
    padding: Padding = field(compare=False)

    @property
    def quantized(self) -> tuple[str, ...]:
        return ()

    @property
    def float(self) -> tuple[str, ...]:
        return (self.value.name,)

    def make(self) -> Range:
        return Range(self)


class Range:
    """An observer of one value."""

    def __init__(self, want: RangeWant) -> None:
        self.want, self.observer = want, Observer(want.spec)

    def see(self, seen: Seen) -> None:
        """Take in a batch."""
        node = self.want.value
        value = self.want.padding.tokens_of(node, seen.float[node.name], seen.mask)
        try:
            self.observer.observe(value)
        except SpecError as error:
            first, last = seen.samples.start, seen.samples.stop - 1
            raise QCompileError(f"{self.want.where} in calibration samples {first}-{last}: {error}") from None

    def add_up(self, processes: Processes) -> None:
        """Take in what the other processes saw."""
        for other in processes.others(self.observer):
            self.observer.merge(other)


@dataclass(frozen=True)
class RoutingWant:
    """How many tokens each expert sees, of the values that decide it."""

    values: tuple[str, ...]
    counts: RoutingCounts = field(compare=False)

    @property
    def quantized(self) -> tuple[str, ...]:
        return ()

    @property
    def float(self) -> tuple[str, ...]:
        return self.values

    def make(self) -> RoutingWant:
        return self

    def see(self, seen: Seen) -> None:
        """Count a batch."""
        for name in self.values:
            self.counts.observe(name, seen.float[name])

    def add_up(self, processes: Processes) -> None:
        """Take in what the other processes counted."""
        self.counts.add_up(self.values, processes.add_up)


class CalibrateWorker(Worker):
    """Fixes scales before products are shown what they read."""

    phase = 0
    needs_quantized = False
    needs_float = True

    def __init__(self, setup: Setup) -> None:
        self.program, self.report = setup.program, Report()
        self.routing, self.padding = RoutingCounts(setup.plain), setup.padding_float
        named = {node.name: node for node in setup.plain.graph.nodes}
        static = [
            q for q in find_qdq(setup.program) if q.spec.when == "static" and not setup.program.is_weight(q.source)
        ]
        decoded = {n: q.quantize for q in find_qdq(setup.program) for n in decoders(setup.program, q)}
        self.places = [(q, named[_unrounded(setup.program, q, decoded).name]) for q in static]
        self.deciders = [named[name] for name in self.routing.sources if static]
        self.settled: set[int] = set()

    def targets(self) -> Sequence[Target]:
        values = dict.fromkeys([*(value for _, value in self.places), *self.deciders])
        return [Target(value, value, changes=False) for value in values]

    def wants(self, stage: Stage) -> Sequence[Want]:
        here = {target.value for target in stage.targets}
        ranges = [self._want(place, value) for _, place, value in self._here(stage)]
        deciding = tuple(node.name for node in self.deciders if node in here)
        return [*ranges, *([RoutingWant(deciding, self.routing)] if deciding else [])]

    def solve(self, stage: Stage, found: Mapping[Want, Collector], processes: Processes) -> Solved:
        here = {target.value for target in stage.targets}
        solved = Solved(facts={"routing": self.routing.counted([n.name for n in self.deciders if n in here])})
        for number, place, value in self._here(stage):
            collector = found[self._want(place, value)]
            assert isinstance(collector, Range)
            for index, tensor in enumerate(collector.observer.qparams().stored()):
                solved.tensors[f"{number}.{index}"] = tensor
        return solved

    def apply(self, stage: Stage, solved: Solved) -> None:
        self.routing.restore(solved.facts["routing"])
        for number, (place, _) in enumerate(self.places):
            stored: list[Tensor] = []
            while (name := f"{number}.{len(stored)}") in solved.tensors:
                stored.append(solved.tensors[name])
            if stored:
                _store(self.program, place, stored, self.report)
                self.settled.add(number)

    def finish(self) -> Report:
        if not self.places:
            self.report.note("no activation is static; nothing to calibrate")
            return self.report
        self.report.note(f"{len(self.places)} activations watched")
        for note in self.padding.notes():
            self.report.note(note)
        self.routing.tell(self.report)
        return self.report

    def _here(self, stage: Stage) -> list[tuple[int, QDQ, fx.Node]]:
        """Places whose value this stage is the first to look at; products that read it may do so later."""
        seen = {target.value for target in stage.targets}
        return [(i, p, value) for i, (p, value) in enumerate(self.places) if value in seen and i not in self.settled]

    def _want(self, place: QDQ, value: fx.Node) -> RangeWant:
        where = f"{_called(place)} of {self.program.module_of(place.params) or place.params.name}"
        return RangeWant(value, place.spec, where, self.padding)


def _store(program: Program, place: QDQ, stored: list[Tensor], report: Report) -> None:
    """Let a place read these parameters, in the order of `QuantSpec.parameters`."""
    module = program.module_of(place.params)
    stem = free_key(program, f"{module}.{_called(place)}" if module else place.source.name, "scale")
    scale, *rest = stored
    found = QParams(scale, None if place.spec.symmetric else rest.pop(0), tuple(rest))
    items = place.items
    names = ["scale", *([] if found.zero_point is None else ["zero_point"]), *outer_names(place.spec)]
    for index, (name, tensor) in enumerate(zip(names, stored, strict=True)):
        replace_by_weight(program, items[index], f"{stem}.{name}", tensor, module)
    program.graph.erase_node(place.params)
    report.rewrote(stem, str(place.spec))
    report.measure(stem, _range(place.spec, found))


def _called(place: QDQ) -> str:
    """What the value is to its module, as `quantize_value` was told."""
    named = re.fullmatch(r"(\w+?)_qparams(_\d+)?", place.params.name)
    return named[1] if named else "input"


def _unrounded(program: Program, place: QDQ, decoded: Mapping[fx.Node, fx.Node]) -> fx.Node:
    """The node whose value is quantized; of a value that is quantized twice, the one before the first time.

    `decoded` is every dequantize with the quantize that it decodes.
    """
    node = place.source
    while node in decoded:
        node = program.arg(decoded[node], "x")
    return node


def _range(spec: QuantSpec, params: QParams) -> dict[str, float]:
    """What the codes reach: the smallest and the largest value any of them stands for."""
    steps = to_steps(params.scale, spec, params.outer)
    if isinstance(spec.element, IntElement):
        zero = 0 if params.zero_point is None else params.zero_point.float()
        ends = [(code - zero) * steps for code in (spec.qmin, spec.qmax)]
    else:
        ends = [-steps * spec.element.largest, steps * spec.element.largest]
    return {"low": min(float(e.min()) for e in ends), "high": max(float(e.max()) for e in ends)}
