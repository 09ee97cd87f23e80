"""quantize and dequantize of activations, in plain operators.

    q = quantize(x, s, z, spec)     ⟶     clamp(round(x / s) + z), cast to int8 or uint8
    x = dequantize(q, s, z, spec)   ⟶     (float(q) − z) · s

The order of operations is that of `qcompile.numerics`, so that codes are the same.
"""

from __future__ import annotations

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.recognise import parse_spec, same, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten


def lower_quantize(rewriter: Rewriter, node: fx.Node) -> None:
    """Replace a quantize call of integers."""
    program = rewriter.program
    scale, zero = program.arg(node, "scale"), program.arg(node, "zero_point")
    spec = parse_spec(program.arg(node, "spec"))
    value = rewriter.as_dtype(node, program.arg(node, "x"), torch.float32)
    value, grouped = _split(rewriter, node, value, scale)
    value = rewriter.call(node, aten.div.Tensor, value, _spread(rewriter, node, scale, grouped))
    if zero is not None and spec.zero != "int":
        value = rewriter.call(node, aten.add.Tensor, value, _spread(rewriter, node, zero, grouped))
    value = rewriter.call(node, aten.round.default, value)
    if zero is not None and spec.zero == "int":
        value = rewriter.call(node, aten.add.Tensor, value, _spread(rewriter, node, zero, grouped))
    value = rewriter.call(node, aten.clamp.default, value, float(spec.qmin), float(spec.qmax))
    codes = rewriter.call(node, aten.to.dtype, value, spec.storage)
    rewriter.replace(node, rewriter.call(node, aten.flatten.using_ints, codes, -2, -1) if grouped else codes)


def lower_dequantize(rewriter: Rewriter, node: fx.Node) -> None:
    """Replace a dequantize call of computed integers."""
    program = rewriter.program
    scale, zero = program.arg(node, "scale"), program.arg(node, "zero_point")
    value = rewriter.as_dtype(node, program.arg(node, "codes"), torch.float32)
    value, grouped = _split(rewriter, node, value, scale)
    if zero is not None:
        value = rewriter.call(node, aten.sub.Tensor, value, _spread(rewriter, node, zero, grouped))
    value = rewriter.call(node, aten.mul.Tensor, value, _spread(rewriter, node, scale, grouped))
    value = rewriter.call(node, aten.flatten.using_ints, value, -2, -1) if grouped else value
    rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))


def _split(rewriter: Rewriter, at: fx.Node, value: fx.Node, scale: fx.Node) -> tuple[fx.Node, bool]:
    """`value` with groups along its last axis as an axis of their own; whether there are any."""
    size, scales = shape_of(value)[-1], shape_of(scale)[-1]
    if same(scales, 1) or same(scales, size):
        return value, False
    return rewriter.call(at, aten.unflatten.int, value, -1, [scales, size // scales]), True


def _spread(rewriter: Rewriter, at: fx.Node, parameter: fx.Node, grouped: bool) -> fx.Node:
    """A scale or zero-point as float32 that broadcasts against the values."""
    value = rewriter.as_dtype(at, parameter, torch.float32)
    return rewriter.call(at, aten.unsqueeze.default, value, -1) if grouped else value
