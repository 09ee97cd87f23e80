"""Which ONNX operators the operators of `ops` become, for `torch.onnx.export(custom_translation_table=…)`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile.backends.onnx_qcdq import ops


def translation_table(opset: int) -> dict[Callable[..., Any], Callable[..., Any]]:
    """Operator → a function that emits its ONNX form at `opset`."""
    import onnx_ir as ir
    import onnxscript

    op: Any = onnxscript.values.Opset("", opset)

    def quantize_linear(x: Any, scale: Any, zero_point: Any, axis: int, block_size: int, signed: bool) -> Any:
        if zero_point is not None:
            return op.QuantizeLinear(x, scale, zero_point, axis=axis, block_size=block_size)
        kind = ir.DataType.INT8 if signed else ir.DataType.UINT8
        return op.QuantizeLinear(x, scale, axis=axis, block_size=block_size, output_dtype=kind.value)

    def dequantize_linear(codes: Any, scale: Any, zero_point: Any, axis: int, block_size: int) -> Any:
        return op.DequantizeLinear(codes, scale, zero_point, axis=axis, block_size=block_size)

    def dynamic_quantize_linear(x: Any) -> Any:
        return op.DynamicQuantizeLinear(x)

    def matmul(x: Any, weight: Any) -> Any:
        return op.MatMul(x, weight)

    def gather(table: Any, index: Any) -> Any:
        return op.Gather(table, index, axis=0)

    def clip(x: Any, low: Any, high: Any) -> Any:
        scalar = low.shape is not None and len(low.shape) == 0
        return op.Clip(x, low, high) if scalar else op.Min(op.Max(x, low), high)

    def unpair(pairs: Any) -> Any:
        low = op.BitwiseAnd(pairs, op.Constant(value=_byte(15)))
        high = op.BitShift(pairs, op.Constant(value=_byte(4)), direction="RIGHT")
        last = op.Constant(value_ints=[-1])
        both = op.Concat(op.Unsqueeze(low, last), op.Unsqueeze(high, last), axis=-1)
        return op.Reshape(both, op.Constant(value_ints=[0] * (len(pairs.shape) - 1) + [-1]))

    def bit_shift(x: Any, bits: int, left: bool) -> Any:
        return op.BitShift(x, op.Constant(value=_byte(bits)), direction="LEFT" if left else "RIGHT")

    def sym_stride(x: Any, dim: int) -> Any:
        # Of two inputs the exporter reads a size off the stride that equals it, were it that of an axis of one.
        return op.ReduceProd(op.Shape(x, start=dim + 1), keepdims=0)

    return {
        ops.QUANTIZE_LINEAR: quantize_linear,
        ops.DEQUANTIZE_LINEAR: dequantize_linear,
        ops.DYNAMIC_QUANTIZE_LINEAR: dynamic_quantize_linear,
        ops.MATMUL: matmul,
        ops.GATHER: gather,
        ops.CLIP: clip,
        ops.UNPAIR: unpair,
        ops.BIT_SHIFT: bit_shift,
        torch.ops.aten.sym_stride.int: sym_stride,
    }


def _byte(value: int) -> Any:
    import numpy as np
    import onnx_ir as ir

    return ir.tensor(np.array(value, dtype=np.uint8))
