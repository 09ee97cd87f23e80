"""Products with a quantized weight, in the forms that onnxruntime runs on packed weights and integers.

    linear(x, dequantize(codes[N, K]), b)   ⟶   MatMul(x, DequantizeLinear(codes[K, N])) + b

and where x is quantized too, its weight is of 8 bits, and one scale holds for all of K:

    static                    MatMul(DQ(Q(x, s, z), s, z), DQ(W)) + b
    run time, symmetric       MatMul(DQ(Q(x / s, 1), 1), DQ(W)) · s + b
    run time, zero-point      (MatMul(DQ(Q(round(x / s) + z, 1), 1), DQ(W)) - z · Σ_k W) · s + b

Each reader gets a Q and a DQ with scales of its own names: onnxruntime merges calls that share them, and then fuses
none. All other products read dequantized activations. Exact but for the order of sums.
"""

from __future__ import annotations

import operator

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.activations import DQ, Parameters, Q, clip_values, linear_parameters, steps, unit
from qcompile.backends.onnx_qcdq.layout import PER_TENSOR, Layout
from qcompile.backends.onnx_qcdq.recognise import (
    CHOOSE,
    Product,
    QuantizedActivation,
    QuantizedWeight,
    float8,
    match_activation,
    parse_spec,
    same,
    shape_of,
)
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.numerics.element import IntElement
from qcompile.numerics.granularity import PerTensor
from qcompile.numerics.quantize import dequantize

TRANSPOSED = "@kn"
"""Ends the key of a weight whose codes lie as [K, N] here and as [N, K] in the program."""


def lower_product(rewriter: Rewriter, product: Product, integer: bool) -> bool:
    """Replace a product's node; `integer` allows the forms with integer activations. Whether one was used."""
    activation = match_activation(rewriter.program, product.x) if integer and _one_scale_for_k(product) else None
    form = None if activation is None else _integer_form(rewriter, product, activation)
    if form is None:
        form = _float_form(rewriter, product)
        activation = None
    _finish(rewriter, product, form)
    return activation is not None


def _finish(rewriter: Rewriter, product: Product, value: fx.Node) -> None:
    node = product.node
    if product.bias is not None:
        bias = rewriter.as_dtype(node, product.bias, torch.float32)
        value = rewriter.call(node, aten.add.Tensor, value, bias)
    rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))


def _one_scale_for_k(product: Product) -> bool:
    """Whether the weight is one that integer kernels take: 8 bits, one scale along K, no zero-point between codes."""
    layout, spec = product.layout, product.weight.spec
    per_output = layout.per_tensor or (layout.axis == 1 and not layout.blocked)
    integers = isinstance(spec.element, IntElement) and spec.bits > 4
    return integers and per_output and not product.weight.float_zero


# ---------------------------------------------------------------- the weight


def weight_values(rewriter: Rewriter, at: fx.Node, product: Product) -> fx.Node:
    """DequantizeLinear of the codes as [K, N], float32."""
    weight, layout = product.weight, product.layout
    return dequantize_linear(rewriter, at, weight, layout, product.out_first)


def dequantize_linear(
    rewriter: Rewriter, at: fx.Node, weight: QuantizedWeight, layout: Layout, transposed: bool
) -> fx.Node:
    """DequantizeLinear of stored codes; of a float zero-point nothing is subtracted here."""
    codes = _stored_codes(rewriter, weight, transposed)
    scale = _stored(rewriter, weight.scale, layout, transposed)
    zero = weight.zero
    zero_node = None if zero is None or weight.float_zero else _stored(rewriter, zero, layout, transposed)
    scale = rewriter.as_dtype(at, scale, torch.float32)
    return rewriter.call(at, DQ, codes, scale, zero_node, layout.axis, layout.block_size)


def _stored_codes(rewriter: Rewriter, weight: QuantizedWeight, transposed: bool) -> fx.Node:
    """A weight's codes, transposed where asked; bit patterns of 8-bit floats as those floats."""
    key, dtype = rewriter.program.key(weight.codes), float8(weight.spec) or weight.spec.storage
    if not transposed and dtype == weight.spec.storage:
        return weight.codes

    def compute(codes: Tensor) -> Tensor:
        return (codes.t() if transposed else codes).view(dtype)

    shape = weight.shape[::-1] if transposed else weight.shape
    return rewriter.derive(key + (TRANSPOSED if transposed else "@nk"), (key,), compute, shape, dtype)


def _stored(rewriter: Rewriter, node: fx.Node, layout: Layout, transposed: bool) -> fx.Node:
    """A weight's scale or zero-point, transposed where asked and in the layout's shape."""
    key = rewriter.program.key(node)
    _, dtype = rewriter.source.meta(key)

    def compute(parameter: Tensor) -> Tensor:
        return layout.apply(parameter.t() if transposed else parameter)

    return rewriter.derive(key + (TRANSPOSED if transposed else "@nk"), (key,), compute, layout.shape, dtype)


# ---------------------------------------------------------------- forms


def _float_form(rewriter: Rewriter, product: Product) -> fx.Node:
    node = product.node
    x = _lift(rewriter, product, rewriter.as_dtype(node, product.x, torch.float32))
    value = rewriter.call(node, ops.MATMUL, x, weight_values(rewriter, node, product))
    if product.weight.float_zero:
        value = rewriter.call(node, aten.sub.Tensor, value, _zero_product(rewriter, product, x))
    return _unlift(rewriter, product, value)


def _lift(rewriter: Rewriter, product: Product, x: fx.Node) -> fx.Node:
    """A matrix with an axis in front, where a bias follows: matrix times matrix plus bias would become a Gemm, which
    onnxruntime does not fuse with dequantization."""
    matrix = product.bias is not None and len(shape_of(product.x)) == 2
    return rewriter.call(product.node, aten.unsqueeze.default, x, 0) if matrix else x


def _unlift(rewriter: Rewriter, product: Product, value: fx.Node) -> fx.Node:
    """Without the axis that `_lift` added."""
    matrix = product.bias is not None and len(shape_of(product.x)) == 2
    return rewriter.call(product.node, aten.squeeze.dim, value, 0) if matrix else value


def _zero_product(rewriter: Rewriter, product: Product, x: fx.Node) -> fx.Node:
    """Σ over each group of x, times (zero · scale): what a float zero-point takes from the product."""
    node, weight = product.node, product.weight
    assert weight.zero is not None
    keys = (rewriter.program.key(weight.scale), rewriter.program.key(weight.zero))
    width = weight.shape[1 if product.out_first else 0]
    shape = shape_of(weight.scale)
    groups = shape[1 if product.out_first else 0]
    outputs = weight.shape[0 if product.out_first else 1]

    def compute(scale: Tensor, zero: Tensor) -> Tensor:
        offset = zero.to(torch.float32) * scale.to(torch.float32)
        offset = offset.t() if product.out_first else offset
        return offset.repeat_interleave(outputs // offset.shape[1], dim=1).contiguous()

    offset = rewriter.derive(f"{keys[1]}{TRANSPOSED}", keys, compute, (groups, outputs), torch.float32)
    sums = rewriter.call(node, aten.unflatten.int, x, -1, [groups, width // groups])
    sums = rewriter.call(node, aten.sum.dim_IntList, sums, [-1])
    return rewriter.call(node, aten.matmul.default, sums, offset)


def _integer_form(rewriter: Rewriter, product: Product, activation: QuantizedActivation) -> fx.Node | None:
    if activation.spec.zero == "float" or not isinstance(activation.spec.element, IntElement):
        return None
    sizes = shape_of(activation.scale)
    if activation.static:
        return _static_form(rewriter, product, activation) if all(same(size, 1) for size in sizes) else None
    if _is_dynamic_quantize_linear(activation):
        return _tensor_form(rewriter, product, activation)
    return _token_form(rewriter, product, activation) if same(sizes[-1], 1) else None


def _static_form(rewriter: Rewriter, product: Product, activation: QuantizedActivation) -> fx.Node:
    node, by = product.node, Parameters(activation.scale, activation.zero, activation.spec)
    x = _lift(rewriter, product, rewriter.as_dtype(node, activation.x, torch.float32))
    if by.partial_range:
        x = clip_values(rewriter, node, x, by)
    parameters = linear_parameters(rewriter, node, by, PER_TENSOR)
    codes = rewriter.call(node, Q, x, *parameters, 0, 0, by.spec.signed)
    values = rewriter.call(node, DQ, codes, *parameters, 0, 0)
    value = rewriter.call(node, ops.MATMUL, values, weight_values(rewriter, node, product))
    return _unlift(rewriter, product, value)


def _token_form(rewriter: Rewriter, product: Product, activation: QuantizedActivation) -> fx.Node:
    node, by = product.node, Parameters(activation.scale, activation.zero, activation.spec)

    def divide() -> fx.Node:
        return steps(rewriter, node, rewriter.as_dtype(node, activation.x, torch.float32), by)

    one = unit(rewriter, node, by.spec)
    codes = rewriter.call(node, Q, rewriter.shared((activation.x, by), divide), *one, 0, 0, by.spec.signed)
    values = rewriter.call(node, DQ, codes, *one, 0, 0)
    value = rewriter.call(node, ops.MATMUL, values, weight_values(rewriter, node, product))
    if by.zero is not None:
        zero = rewriter.as_dtype(node, by.zero, torch.float32)
        excess = rewriter.call(node, aten.mul.Tensor, zero, _sums(rewriter, product))
        value = rewriter.call(node, aten.sub.Tensor, value, excess)
    return rewriter.call(node, aten.mul.Tensor, value, rewriter.as_dtype(node, by.scale, torch.float32))


def _sums(rewriter: Rewriter, product: Product) -> fx.Node:
    """Σ_k of the weight's values, one per output: what one step of a zero-point adds to the product."""
    weight = product.weight
    parts = [p for p in (weight.codes, weight.scale, weight.zero) if p is not None]
    keys = tuple(rewriter.program.key(p) for p in parts)
    outputs = weight.shape[0 if product.out_first else 1]

    def compute(codes: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = dequantize(codes, scale, zero, weight.spec, torch.float32)
        return values.to(torch.float64).sum(1 if product.out_first else 0).to(torch.float32)

    return rewriter.derive(f"{keys[0]}.sums", keys, compute, (outputs,), torch.float32)


def _is_dynamic_quantize_linear(activation: QuantizedActivation) -> bool:
    """Whether ONNX's DynamicQuantizeLinear computes this: uint8 codes of a tensor's whole range."""
    spec = activation.spec
    chosen = activation.scale.args[0] if activation.scale.target is operator.getitem else None
    return (
        isinstance(chosen, fx.Node)
        and chosen.target is CHOOSE
        and chosen.args[0] is activation.x
        and parse_spec(str(chosen.args[1])) == spec
        and spec.element == IntElement(8, signed=False)
        and isinstance(spec.granularity, PerTensor)
        and (spec.zero, str(spec.scale), str(spec.observer)) == ("int", "f32", "minmax")
    )


def _tensor_form(rewriter: Rewriter, product: Product, activation: QuantizedActivation) -> fx.Node:
    node = product.node
    x = rewriter.as_dtype(node, activation.x, torch.float32)
    made = rewriter.call(node, ops.DYNAMIC_QUANTIZE_LINEAR, x)
    codes, scale, zero = (rewriter.call(node, operator.getitem, made, i) for i in range(3))
    values = rewriter.call(node, DQ, codes, scale, zero, 0, 0)
    return rewriter.call(node, ops.MATMUL, values, weight_values(rewriter, node, product))
