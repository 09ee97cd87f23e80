"""The Hadamard transform as products with its Kronecker factors, small matrices that all transforms of one size share.

    y = hadamard(x [..., n], order, block)
    ⟶  [..., n / block, r₁, r₂]: the last axis times r₂'s factor, the one before from the left with r₁'s; flattened

Exact up to rounding. Half precision is computed in float32, as the operator is.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.hadamard.kernel import orthonormal

_BITS = 6
"""A product with up to 2⁶ rows costs onnxruntime less than two smaller ones."""


def lower_hadamard(rewriter: Rewriter, node: fx.Node) -> None:
    """Write the products of one call."""
    program = rewriter.program
    order, block = (int(str(program.arg(node, name))) for name in ("order", "block"))
    inverse = bool(program.arg(node, "inverse"))
    *first, last = orthonormal(order, block, inverse, torch.float32, torch.device("cpu"), _BITS)
    key = f"hadamard.{order}.{block}" + (".inverse" if inverse else "")
    value = rewriter.as_dtype(node, program.arg(node, "x"), torch.float32)
    value = rewriter.call(node, aten.unflatten.int, value, -1, [-1, *(m.shape[0] for m in first), last.shape[0]])
    value = rewriter.call(node, ops.MATMUL, value, _shared(rewriter, f"{key}.last", last.T.contiguous()))
    for i, matrix in reversed(list(enumerate(first))):
        value = rewriter.call(node, aten.matmul.default, _shared(rewriter, f"{key}.{i}", matrix), value)
        value = rewriter.call(node, aten.flatten.using_ints, value, -2, -1)
    value = rewriter.call(node, aten.flatten.using_ints, value, -2, -1)
    rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))


def _shared(rewriter: Rewriter, key: str, matrix: Tensor) -> fx.Node:
    return rewriter.shared(key, lambda: rewriter.constant(key, matrix))
