"""Fix the scales of static activations from calibration data.

    p = choose_qparams(x, "… static"); s, z = p  ⟶  s, z are weights <module>.input.scale and <module>.input.zero_point

The ranges are those of the float program: weights and activations are not rounded while it is watched. Memory is that
of running the program plus one observer a place, whatever the number of batches.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from qcompile.errors import QCompileError, SpecError
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.numerics.observers import Observer
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.quantize.sites import QDQ, find_qdq, free_key, replace_by_weight
from qcompile.progress import track


@register
@dataclass(frozen=True)
class Calibrate(CalibratedPass):
    """Watch static activations on the batches and store their scales.

    Raises QCompileError for data without tokens, and for a nan or infinity with the module and the batch.
    """

    name: ClassVar[str] = "calibrate"

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        report = Report()
        places = [p for p in find_qdq(program) if p.spec.when == "static" and not program.is_weight(p.source)]
        if not places:
            report.note("no activation is static; nothing to calibrate")
            return report
        observers = {p.params.name: Observer(p.spec) for p in places}
        tokens = _watch(program, batches, places, observers)
        if not tokens:
            raise QCompileError("the calibration data has no tokens; give data= with at least one batch")
        for place in places:
            _store(program, place, observers[place.params.name], report)
        report.note(f"{len(places)} activations watched over {tokens} tokens")
        program.refresh()
        return report


def without_rounding(program: Program) -> Program:
    """A copy of the program in which nothing is quantized but weights that are stored as codes."""
    copy = program.clone()
    for place in find_qdq(copy):
        for node in place.dequantize:
            copy.replace(node, place.source)
    copy.refresh()
    return copy


def _watch(program: Program, batches: Iterable[Tensor], places: list[QDQ], observers: dict[str, Observer]) -> int:
    """Run the batches through the float program; returns the number of tokens."""
    plain = without_rounding(program)
    watched: dict[str, list[QDQ]] = {}
    for place in places:
        watched.setdefault(place.source.name, []).append(place)
    tokens = 0
    for index, batch in enumerate(track(batches, "calibrating")):

        def observe(node: fx.Node, value: Any, index: int = index) -> None:
            for place in watched.get(node.name, ()):
                try:
                    observers[place.params.name].observe(value)
                except SpecError as error:
                    where = program.module_of(place.params) or place.params.name
                    raise QCompileError(f"input of {where} in calibration batch {index}: {error}") from None

        run(plain, fill(plain, {"input_ids": batch}), observe)
        tokens += batch.numel()
    return tokens


def _store(program: Program, place: QDQ, observer: Observer, report: Report) -> None:
    module = program.module_of(place.params)
    scale, zero_point = observer.qparams()
    stem = free_key(program, f"{module}.input" if module else place.source.name, "scale")
    items = place.items
    replace_by_weight(program, items[0], f"{stem}.scale", scale, module)
    if zero_point is not None:
        replace_by_weight(program, items[1], f"{stem}.zero_point", zero_point, module)
    program.graph.erase_node(place.params)
    report.rewrote(stem, str(place.spec))
    report.measure(stem, _range(place, scale, zero_point))


def _range(place: QDQ, scale: Tensor, zero_point: Tensor | None) -> dict[str, float]:
    """What the codes reach: the smallest and the largest value any of them stands for."""
    zero = 0 if zero_point is None else zero_point.float()
    ends = [((code - zero) * scale.float()) for code in (place.spec.qmin, place.spec.qmax)]
    return {"low": min(float(e.min()) for e in ends), "high": max(float(e.max()) for e in ends)}
