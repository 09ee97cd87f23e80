"""From a program to one that can be written in the torch dialect and compiled: still a program that runs.

    linear(x, dequantize(codes, s))                   ⟶  qcompile_mlir::linear(x, codes, s)
    linear(dequantize(quantize(x)), dequantize(w))    ⟶  qcompile_mlir::integer_linear(quantize(x), w) · s_x · s_w
    embedding(dequantize(codes, s), ids)              ⟶  qcompile_mlir::rows(ids, codes, s)
    topk(x, k)                                        ⟶  the largest, k times
    new_ones([], bool) & m                            ⟶  m

A copy is rewritten. No weight is read: the ones that change layout are derived when they are written.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.qparams import lower_choose_qparams, merge_equal
from qcompile.backends.onnx_qcdq.recognise import CHOOSE, DEQUANTIZE, QUANTIZE, match_product, match_weight
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.backends.torch_mlir import products
from qcompile.backends.torch_mlir.activations import lower_dequantize, lower_quantize
from qcompile.backends.torch_mlir.weights import Packing
from qcompile.hadamard import HADAMARD
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Prelowered:
    """The rewritten program, and what was found in it."""

    program: Program
    products: int  # with a quantized weight
    integer_products: int  # of those, the ones that sum integers


def prelower(program: Program, packing: Packing) -> Prelowered:
    """Rewrite a copy of `program`; see the file's first lines."""
    rewriter = Rewriter(program)
    merge_equal(rewriter)
    found = [p for node in rewriter.program.nodes if (p := match_product(rewriter.program, node)) is not None]
    integer = sum([products.lower_product(rewriter, product, packing) for product in found])
    products.lower_rows(rewriter, packing)
    for node in rewriter.program.calls(DEQUANTIZE):
        if (weight := match_weight(rewriter.program, node)) is not None:
            products.lower_weight(rewriter, weight, packing)
    for node in rewriter.program.calls(QUANTIZE):
        lower_quantize(rewriter, node)
    for node in rewriter.program.calls(DEQUANTIZE):
        lower_dequantize(rewriter, node)
    for node in rewriter.program.calls(CHOOSE):
        lower_choose_qparams(rewriter, node)
    for node in rewriter.program.calls(HADAMARD):
        products.lower_hadamard(rewriter, node)
    _tidy(rewriter)
    rewriter.program.refresh()
    return Prelowered(rewriter.program, len(found), integer)


def _tidy(rewriter: Rewriter) -> None:
    """What the torch dialect knows and IREE 3.13 does not compile, or compiles wrongly."""
    program = rewriter.program
    for node in program.calls(aten.__and__.Tensor):
        for one, other in (node.args, node.args[::-1]):
            if _is_true(one) and isinstance(other, fx.Node) and other.meta["val"].dtype == torch.bool:
                rewriter.replace(node, other)
                break
    for node in program.calls(aten.topk.default):
        _lower_topk(rewriter, node)


def _is_true(value: Any) -> bool:
    """Whether a node is a single True: IREE takes no literal of one bit."""
    return (
        isinstance(value, fx.Node)
        and value.target is aten.new_ones.default
        and value.meta["val"].dtype == torch.bool
        and value.meta["val"].dim() == 0
    )


def _lower_topk(rewriter: Rewriter, node: fx.Node) -> None:
    """The k largest one after another: IREE 3.13 gives wrong indices for topk where sizes vary."""
    program = rewriter.program
    x, k, axis = program.arg(node, "self"), program.arg(node, "k"), program.arg(node, "dim")
    rank = x.meta["val"].dim()
    at = axis % rank
    count = x.meta["val"].shape[at]
    places = rewriter.call(node, aten.arange.default, count)
    places = rewriter.call(node, aten.view.default, places, [count if i == at else 1 for i in range(rank)])
    values, indices = [], []
    for step in range(k):
        best = rewriter.call(node, aten.max.dim, x, at, True)
        values.append(rewriter.call(node, operator.getitem, best, 0))
        indices.append(rewriter.call(node, operator.getitem, best, 1))
        if step + 1 < k:
            taken = rewriter.call(node, aten.eq.Tensor, places, indices[-1])
            x = rewriter.call(node, aten.masked_fill.Scalar, x, taken, float("-inf"))
    for user in list(node.users):
        parts = values if user.args[1] == 0 else indices
        rewriter.replace(user, rewriter.call(node, aten.cat.default, parts, at))
    program.graph.erase_node(node)
