"""The places that `insert-qdq` made, as passes that choose codes or scales find them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.errors import SpecError
from qcompile.ir.program import Program
from qcompile.numerics.blocks import rows
from qcompile.numerics.qtensor import QTensor, sqnr_db
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report

codes_ops = torch.ops.qcompile


@dataclass(frozen=True)
class QDQ:
    """One value `source` (a weight placeholder or an activation) that is quantized and dequantized."""

    source: fx.Node
    spec: QuantSpec
    params: fx.Node  # choose_qparams
    quantize: fx.Node
    dequantize: tuple[fx.Node, ...]

    @property
    def items(self) -> Mapping[int, fx.Node]:
        """The getitem nodes, by their place in `QuantSpec.parameters`: 0 is the scale."""
        return {index: n for n in self.params.users for index in n.args[1:] if isinstance(index, int)}


def find_qdq(program: Program) -> list[QDQ]:
    """Every place where scales are still computed in the graph, in program order."""
    found = []
    for params in program.calls(codes_ops.choose_qparams.default):
        scale = next(n for n in params.users if n.target is operator.getitem and n.args[1] == 0)
        quantize = next(n for n in scale.users if n.target is codes_ops.quantize.default)
        readers = tuple(n for n in quantize.users if n.target is codes_ops.dequantize.default)
        spec = QuantSpec.parse(program.arg(params, "spec"))
        found.append(QDQ(program.arg(params, "x"), spec, params, quantize, readers))
    return found


def weight_qdq(program: Program) -> list[QDQ]:
    """The places where a weight is still rounded in the graph: what a pass that rounds weights has to replace."""
    return [place for place in find_qdq(program) if program.is_weight(place.source)]


def given_outer(program: Program, place: QDQ) -> tuple[Tensor, ...]:
    """Outer parameters of a weight that a pass has fixed ahead, as a global scale; () where it chooses its own."""
    return tuple(program.weight(node) for node in program.arg(place.params, "outer") or ())


def store_codes(program: Program, place: QDQ, weight: Tensor, result: QTensor, report: Report) -> None:
    """Replace the computed codes and parameters of a weight, `weight`, by those of `result`.

    They are called ``<key>.codes``, ``<key>.scale``, ``<key>.zero_point`` and so on, by the names of
    `QuantSpec.parameters`; the float weight is dropped if nothing else reads it. Records the signal to noise ratio of
    the result and its bits per weight in the report, and how many blocks decode to nan where the format can say so.
    """
    key, module = program.key(place.source), place.params.meta["module"]
    stem = free_key(program, key, "codes")
    values = result.dequantize(weight.dtype)
    figures = {"sqnr_db": sqnr_db(weight, values), "bits_per_weight": result.bits_per_element}
    report.measure(stem, figures)
    if not math.isfinite(figures["sqnr_db"]) and (broken := _blocks_of_nan(values, result.spec)):
        count = math.prod(result.spec.scale_shape(values.shape))
        report.note(f"{key}: {broken} of {count} blocks hold nan or infinity, and decode to nan")
    items = place.items
    replace_by_weight(program, place.quantize, f"{stem}.codes", result.codes, module)
    for index, (name, tensor) in enumerate(result.parameters.items()):
        replace_by_weight(program, items[index], f"{stem}.{name}", tensor, module)
    program.graph.erase_node(place.params)
    program.refresh()


@contextmanager
def naming(key: str) -> Iterator[None]:
    """Let a SpecError raised inside (nan or infinity in a weight, say) begin with the weight it is about."""
    try:
        yield
    except SpecError as error:
        raise SpecError(f"weight {key!r}: {error}") from None


def _blocks_of_nan(values: Tensor, spec: QuantSpec) -> int:
    return int(rows(values.isnan(), spec.scale_shape(values.shape)).any(1).sum())


def replace_by_weight(program: Program, node: fx.Node, key: str, tensor: Tensor, module: str) -> None:
    """Store `tensor` and let the readers of `node` read it."""
    program.replace(node, program.add_weight(key, tensor, module=module))


def free_key(program: Program, key: str, suffix: str) -> str:
    """`key`, or with ``_2``, ``_3``, … the first for which ``<key>.<suffix>`` is not taken."""
    stem, count = key, 1
    while f"{stem}.{suffix}" in program.weights:
        count += 1
        stem = f"{key}_{count}"
    return stem
