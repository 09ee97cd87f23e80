"""ONNX's own quantization operators as torch operators, so that a lowered program still runs, verifies and prints.

`prelower` writes them, `translate` turns each into the ONNX operator of its name. They follow the ONNX operator
specification (opset 21), QuantizeLinear-21 and DequantizeLinear-21:

- a scale of rank 0 is per tensor; of rank 1 per index of `axis`; of the operand's rank blocked: `block_size`
  neighbours along `axis` share it;
- `block_size` is 0 unless blocked;
- codes are ``saturate(round_half_even(x / scale) + zero_point)``, values ``(code - zero_point) * scale``.

Codes of 4 bits or fewer are held one a byte here, as everywhere in a program; packing happens when they are written.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.library import custom_op

NAMESPACE = "qcompile_onnx"


def _spread(parameter: Tensor, operand: Tensor, axis: int, block_size: int) -> Tensor:
    """A scale or zero-point with the operand's rank, ready to broadcast."""
    if parameter.dim() == 0:
        return parameter
    axis %= operand.dim()
    if block_size:
        return parameter.repeat_interleave(block_size, dim=axis)
    return parameter.reshape([-1 if i == axis else 1 for i in range(operand.dim())])


@custom_op(f"{NAMESPACE}::quantize_linear", mutates_args=())
def quantize_linear(
    x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int, signed: bool
) -> Tensor:
    """QuantizeLinear: codes of `x` (float32, any shape), int8 where `signed`, else uint8; `zero_point` likewise."""
    limits = torch.iinfo(code_dtype(signed))
    steps = torch.round(x / _spread(scale, x, axis, block_size))
    if zero_point is not None:
        steps = steps + _spread(zero_point, x, axis, block_size).to(x.dtype)
    return steps.clamp(limits.min, limits.max).to(code_dtype(signed))


@quantize_linear.register_fake
def _(x: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int, signed: bool) -> Tensor:
    return torch.empty_like(x, dtype=code_dtype(signed))


def code_dtype(signed: bool) -> torch.dtype:
    """What holds a code."""
    return torch.int8 if signed else torch.uint8


@custom_op(f"{NAMESPACE}::dequantize_linear", mutates_args=())
def dequantize_linear(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int) -> Tensor:
    """DequantizeLinear: values of `codes`, int8, uint8 or an 8-bit float, in `scale`'s dtype."""
    values = codes.to(scale.dtype)
    if zero_point is not None:
        values = values - _spread(zero_point, codes, axis, block_size).to(scale.dtype)
    return values * _spread(scale, codes, axis, block_size)


@dequantize_linear.register_fake
def _(codes: Tensor, scale: Tensor, zero_point: Tensor | None, axis: int, block_size: int) -> Tensor:
    return torch.empty_like(codes, dtype=scale.dtype)


@custom_op(f"{NAMESPACE}::dynamic_quantize_linear", mutates_args=())
def dynamic_quantize_linear(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """DynamicQuantizeLinear: uint8 codes of float32 `x`, its scale (float32, rank 0) and zero-point (uint8, rank 0)."""
    low, high = x.amin().clamp(max=0), x.amax().clamp(min=0)
    scale = (high - low) / 255
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    zero = torch.round(-low / scale).clamp(0, 255)
    return (torch.round(x / scale) + zero).clamp(0, 255).to(torch.uint8), scale, zero.to(torch.uint8)


@dynamic_quantize_linear.register_fake
def _(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    scalar: list[int] = []
    return torch.empty_like(x, dtype=torch.uint8), x.new_empty(scalar), x.new_empty(scalar, dtype=torch.uint8)


@custom_op(f"{NAMESPACE}::matmul", mutates_args=())
def matmul(x: Tensor, weight: Tensor) -> Tensor:
    """MatMul of `x` [..., K] with a weight [K, N]; never Gemm, which onnxruntime does not fuse with dequantization."""
    return torch.matmul(x, weight)


@matmul.register_fake
def _(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[-1]))


@custom_op(f"{NAMESPACE}::gather", mutates_args=())
def gather(table: Tensor, index: Tensor) -> Tensor:
    """Gather along axis 0: rows of `table` (any dtype) at integer `index` [...]; [..., *table.shape[1:]]."""
    return table[index]


@gather.register_fake
def _(table: Tensor, index: Tensor) -> Tensor:
    return table.new_empty((*index.shape, *table.shape[1:]))


@custom_op(f"{NAMESPACE}::clip", mutates_args=())
def clip(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """`x` within [low, high], which broadcast against it: Clip where they are of rank 0, Min and Max where not."""
    return torch.clamp(x, low, high)


@clip.register_fake
def _(x: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return torch.empty_like(x)


@custom_op(f"{NAMESPACE}::unpair", mutates_args=())
def unpair(pairs: Tensor) -> Tensor:
    """Two codes from each byte [..., D/2], the low half first: uint8 [..., D]."""
    return torch.stack([pairs & 15, pairs >> 4], -1).flatten(-2)


@unpair.register_fake
def _(pairs: Tensor) -> Tensor:
    return pairs.new_empty((*pairs.shape[:-1], 2 * pairs.shape[-1]))


@custom_op(f"{NAMESPACE}::bit_shift", mutates_args=())
def bit_shift(x: Tensor, bits: int, left: bool) -> Tensor:
    """BitShift of uint8 `x` [...] by `bits` to the left or right; what leaves the byte is lost, zeros come in."""
    return torch.bitwise_left_shift(x, bits) if left else torch.bitwise_right_shift(x, bits)


@bit_shift.register_fake
def _(x: Tensor, bits: int, left: bool) -> Tensor:
    return torch.empty_like(x)


QUANTIZE_LINEAR = torch.ops.qcompile_onnx.quantize_linear.default
DEQUANTIZE_LINEAR = torch.ops.qcompile_onnx.dequantize_linear.default
DYNAMIC_QUANTIZE_LINEAR = torch.ops.qcompile_onnx.dynamic_quantize_linear.default
MATMUL = torch.ops.qcompile_onnx.matmul.default
GATHER = torch.ops.qcompile_onnx.gather.default
CLIP = torch.ops.qcompile_onnx.clip.default
UNPAIR = torch.ops.qcompile_onnx.unpair.default
BIT_SHIFT = torch.ops.qcompile_onnx.bit_shift.default
