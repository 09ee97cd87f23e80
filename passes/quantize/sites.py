"""The places that `insert-qdq` made, as passes that choose codes or scales find them."""

from __future__ import annotations

import operator
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program
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
        """The getitem nodes: 0 the scale, 1 the zero-point where there is one."""
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


def store_codes(program: Program, place: QDQ, weight: Tensor, result: QTensor, report: Report) -> None:
    """Replace the computed codes, scale and zero-point of a weight, `weight`, by those of `result`.

    They are called ``<key>.codes``, ``<key>.scale`` and ``<key>.zero_point``; the float weight is dropped if nothing
    else reads it. Records the signal to noise ratio of the result and its bits per weight in the report.
    """
    key, module = program.key(place.source), place.params.meta["module"]
    stem = free_key(program, key, "codes")
    figures = {"sqnr_db": sqnr_db(weight, result.dequantize(weight.dtype)), "bits_per_weight": result.bits_per_element}
    report.measure(stem, figures)
    items = place.items
    replace_by_weight(program, place.quantize, f"{stem}.codes", result.codes, module)
    replace_by_weight(program, items[0], f"{stem}.scale", result.scale, module)
    if result.zero_point is not None:
        replace_by_weight(program, items[1], f"{stem}.zero_point", result.zero_point, module)
    program.graph.erase_node(place.params)
    program.refresh()


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
