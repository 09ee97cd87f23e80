"""Fix the scales of static activations from calibration data.

    p = choose_qparams(x, "… static"); s, z = p  ⟶  s, z are weights <module>.input.scale and <module>.input.zero_point

(`<module>.output.scale` for a result, and so on: what the value is to the module.) The ranges are those of the float
program: weights and activations are not rounded while it is watched. Memory is that of running the program plus one
observer a place, whatever the number of batches. Where the program chooses among experts, how many tokens each of them
saw is counted along the way.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import QCompileError, SpecError
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.numerics.element import IntElement
from qcompile.numerics.observers import Observer
from qcompile.numerics.parameters import QParams, outer_names
from qcompile.numerics.scaling import to_steps
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.quantize.routing import RoutingCounts
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
        plain = without_rounding(program)
        routing = RoutingCounts(plain)
        tokens = _watch(program, plain, batches, places, observers, routing)
        if not tokens:
            raise QCompileError("the calibration data has no tokens; give data= with at least one batch")
        for place in places:
            _store(program, place, observers[place.params.name], report)
        report.note(f"{len(places)} activations watched over {tokens} tokens")
        routing.tell(report)
        program.refresh()
        return report


def without_rounding(program: Program) -> Program:
    """A copy of the program in which nothing is quantized but weights that are stored as codes.

    It is for runs with an empty cache: where the cache is kept as codes, what is read is the new tokens alone.
    """
    copy = program.clone()
    for place in find_qdq(copy):
        for node in _decoders(copy, place):
            copy.replace(node, copy.arg(place.quantize, "x"))  # what place.source was may be replaced by now
    copy.refresh()
    return copy


def _decoders(program: Program, place: QDQ) -> Sequence[fx.Node]:
    """What decodes the codes, at once or once they stand behind those of an input."""
    if place.dequantize:
        return place.dequantize
    decoded: list[fx.Node] = []
    seen, joined, waiting = {place.quantize}, False, [place.quantize]
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if user.target is torch.ops.qcompile.dequantize.default:
                decoded.append(user)
                continue
            joined |= any(node.op == "placeholder" and not program.is_weight(node) for node in user.all_input_nodes)
            waiting.append(user)
    return decoded if joined else []


def _watch(
    program: Program,
    plain: Program,
    batches: Iterable[Tensor],
    places: list[QDQ],
    observers: dict[str, Observer],
    routing: RoutingCounts,
) -> int:
    """Run the batches through `plain`, which is `program` unrounded; returns the number of tokens."""
    decoded = {node: place.quantize for place in find_qdq(program) for node in _decoders(program, place)}
    watched: dict[str, list[QDQ]] = {}
    for place in places:
        watched.setdefault(_unrounded(program, place, decoded).name, []).append(place)
    tokens = 0
    for index, batch in enumerate(track(batches, "calibrating")):

        def observe(node: fx.Node, value: Any, index: int = index) -> None:
            routing.observe(node, value)
            for place in watched.get(node.name, ()):
                try:
                    observers[place.params.name].observe(value)
                except SpecError as error:
                    where = program.module_of(place.params) or place.params.name
                    what = f"{_called(place)} of {where} in calibration batch {index}"
                    raise QCompileError(f"{what}: {error}") from None

        run(plain, fill(plain, {"input_ids": batch}), observe)
        tokens += batch.numel()
    return tokens


def _store(program: Program, place: QDQ, observer: Observer, report: Report) -> None:
    module = program.module_of(place.params)
    found = observer.qparams()
    stem = free_key(program, f"{module}.{_called(place)}" if module else place.source.name, "scale")
    items = place.items
    names = ["scale", *([] if found.zero_point is None else ["zero_point"]), *outer_names(place.spec)]
    for index, (name, tensor) in enumerate(zip(names, found.stored(), strict=True)):
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
