"""Rows of a quantized table: gather the codes, then dequantize what was gathered.

    embedding(dequantize(codes[V, D]), ids)      ⟶   DequantizeLinear(Gather(codes, ids), Gather(scale, ids))
    index(dequantize(codes[E, N, K]), [experts]) ⟶   likewise

onnxruntime gathers no 4-bit integers, so codes of 4 bits or fewer are stored two a byte, as uint8 along the last axis,
and taken apart after the gather. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.recognise import QuantizedWeight, match_weight, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten

PAIRED = "@pairs"
"""Ends the key of codes that are stored two a byte, the first in the low half."""


def lower_gathers(rewriter: Rewriter) -> None:
    """Rewrite every embedding, index and index_select that reads rows of a quantized weight."""
    for node in rewriter.program.nodes:
        table, index = _row_gather(rewriter, node)
        weight = match_weight(rewriter.program, table)
        if weight is None or index is None or not _gatherable(weight):
            continue
        value = _gather(rewriter, node, weight, index)
        rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))
    rewriter.program.refresh()


def _row_gather(rewriter: Rewriter, node: fx.Node) -> tuple[Any, Any]:
    """(table, index) where the call takes rows by an integer index; (None, None) where not."""
    program = rewriter.program
    if node.target is aten.embedding.default:
        return program.arg(node, "weight"), program.arg(node, "indices")
    if node.target is aten.index_select.default and program.arg(node, "dim") == 0:
        return node.args[0], program.arg(node, "index")
    if node.target is aten.index.Tensor:
        indices: Any = program.arg(node, "indices")
        if len(indices) == 1 and isinstance(indices[0], fx.Node) and indices[0].meta["val"].dtype == torch.int64:
            return node.args[0], indices[0]
    return None, None


def _gatherable(weight: QuantizedWeight) -> bool:
    """Whether a row's scales are rows of the scale, blocked along one axis that is not the first."""
    rows, scales = weight.shape, shape_of(weight.scale)
    shared = [axis for axis in range(1, len(rows)) if scales[axis] != rows[axis]]
    if weight.float_zero or len(rows) < 2 or scales[0] != rows[0] or len(shared) != 1:
        return False
    return weight.spec.bits > 4 or rows[-1] % 2 == 0


def _gather(rewriter: Rewriter, at: fx.Node, weight: QuantizedWeight, index: fx.Node) -> fx.Node:
    rows, scales = weight.shape, shape_of(weight.scale)
    (axis,) = [axis for axis in range(1, len(rows)) if scales[axis] != rows[axis]]
    codes = _codes(rewriter, at, weight, index)
    scale = rewriter.as_dtype(at, rewriter.call(at, ops.GATHER, weight.scale, index), torch.float32)
    zero = None if weight.zero is None else rewriter.call(at, ops.GATHER, weight.zero, index)
    moved = len(shape_of(index)) - 1
    return rewriter.call(at, ops.DEQUANTIZE_LINEAR, codes, scale, zero, axis + moved, rows[axis] // scales[axis])


def _codes(rewriter: Rewriter, at: fx.Node, weight: QuantizedWeight, index: fx.Node) -> fx.Node:
    if weight.spec.bits > 4:
        return rewriter.call(at, ops.GATHER, weight.codes, index)
    key = rewriter.program.key(weight.codes)
    shape = (*weight.shape[:-1], weight.shape[-1] // 2)
    pairs = rewriter.derive(f"{key}{PAIRED}", (key,), pair, shape, torch.uint8)
    taken = rewriter.call(at, ops.GATHER, pairs, index)
    codes = rewriter.call(at, ops.UNPAIR, taken)
    if not weight.spec.signed:
        return codes
    signed = rewriter.call(at, aten.to.dtype, codes, torch.int8)
    return rewriter.call(at, aten.sub.Scalar, signed, 8)


def pair(codes: Tensor) -> Tensor:
    """Codes of 4 bits or fewer, two a byte along the last axis; signed ones with 8 added. [..., D] → [..., D/2]."""
    plain = (codes.to(torch.int16) + (8 if codes.dtype == torch.int8 else 0)).to(torch.uint8)
    return plain[..., 0::2] | (plain[..., 1::2] << 4)
