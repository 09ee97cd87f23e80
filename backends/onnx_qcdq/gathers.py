"""Rows of a quantized table: gather the codes, then dequantize what was gathered.

    embedding(dequantize(codes[V, D]), ids)      ⟶   DequantizeLinear(Gather(codes, ids), Gather(scale, ids))
    index(dequantize(codes[E, N, K]), [experts]) ⟶   likewise

onnxruntime gathers no 4-bit integers, so codes of 4 bits or fewer are stored two a byte, as uint8 along the last axis,
and taken apart after the gather. Nor does it gather 8-bit floats: their bit patterns are stored as uint8, and what they
are worth is looked up in a table of 256, after the gather. Exact.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.recognise import QuantizedWeight, float8, match_weight, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.numerics.element import FloatElement
from qcompile.numerics.packing import to_unsigned

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
    """Whether a row's scales are rows of the scale, or one for all, and shared along one axis or along all of them."""
    rows, scales = weight.shape, shape_of(weight.scale)
    if weight.float_zero or len(rows) < 2 or (weight.spec.bits <= 4 and rows[-1] % 2):
        return False
    whole = all(size == 1 for size in scales[1:])
    return (scales[0] == rows[0] or weight.layout.per_tensor) and (whole or len(_shared(weight)) == 1)


def _shared(weight: QuantizedWeight) -> list[int]:
    """The axes of a row along which neighbours share a scale."""
    scales = shape_of(weight.scale)
    return [axis for axis, size in enumerate(weight.shape) if axis and scales[axis] != size]


def _gather(rewriter: Rewriter, at: fx.Node, weight: QuantizedWeight, index: fx.Node) -> fx.Node:
    def of_rows(parameter: fx.Node) -> fx.Node:
        return parameter if weight.layout.per_tensor else rewriter.call(at, ops.GATHER, parameter, index)

    codes, shared = _codes(rewriter, at, weight, index), _shared(weight)
    scale = rewriter.as_dtype(at, of_rows(weight.scale), torch.float32)
    zero = None if weight.zero is None else of_rows(weight.zero)
    blocked = len(shared) == 1 and not weight.layout.per_tensor
    axis = shared[0] + len(shape_of(index)) - 1 if blocked else 0
    size = weight.shape[shared[0]] // shape_of(weight.scale)[shared[0]] if blocked else 0
    if blocked and float8(weight.spec) is None:
        return rewriter.call(at, ops.DEQUANTIZE_LINEAR, codes, scale, zero, axis, size)
    value = _numbers(rewriter, at, weight, codes)
    if zero is not None:
        value = rewriter.call(at, aten.sub.Tensor, value, rewriter.as_dtype(at, zero, torch.float32))
    if not blocked:
        return rewriter.call(at, aten.mul.Tensor, value, scale)
    value = rewriter.call(at, aten.unflatten.int, value, axis, [shape_of(scale)[axis], size])
    value = rewriter.call(at, aten.mul.Tensor, value, rewriter.call(at, aten.unsqueeze.default, scale, axis + 1))
    return rewriter.call(at, aten.flatten.using_ints, value, axis, axis + 1)


def _numbers(rewriter: Rewriter, at: fx.Node, weight: QuantizedWeight, codes: fx.Node) -> fx.Node:
    """What codes stand for before their scale, float32."""
    element = weight.spec.element
    if not isinstance(element, FloatElement):
        return rewriter.as_dtype(at, codes, torch.float32)

    def values() -> fx.Node:
        return rewriter.constant(f"{element}.values", element.decode(torch.arange(256, dtype=torch.uint8)))

    index = rewriter.as_dtype(at, codes, torch.int32)
    return rewriter.call(at, ops.GATHER, rewriter.shared((str(element), "values"), values), index)


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
    plain = to_unsigned(codes, 4)
    return plain[..., 0::2] | (plain[..., 1::2] << 4)
