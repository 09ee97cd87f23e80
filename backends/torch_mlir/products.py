"""Products with quantized weights, rows of quantized tables, and any other weight that is dequantized.

Where the activation is integers too and one scale holds for all of K, the product sums integers in int32:

    y = s_x · s_w · (Σ x w − z_x Σ w − z_w (Σ x − K z_x))

Every sum in it is one of integers; Σ w is stored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.recognise import (
    Product,
    QuantizedActivation,
    QuantizedWeight,
    match_activation,
    match_weight,
    shape_of,
)
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.backends.torch_mlir import ops
from qcompile.backends.torch_mlir.values import Values, stores_float_scales, values_of
from qcompile.backends.torch_mlir.weights import Packing
from qcompile.hadamard.kernel import orthonormal
from qcompile.numerics.element import IntElement

SUMS = ".sums"
"""Ends the key of the sums of a weight's codes."""


def lower_product(rewriter: Rewriter, product: Product, packing: Packing) -> bool:
    """Replace a product's node; whether it sums integers."""
    node, program = product.node, rewriter.program
    values = values_of(rewriter, product.weight, packing, transposed=not product.out_first)
    activation = match_activation(program, product.x)
    integer = activation is not None and _sums_integers(product.weight, values, activation)
    if integer:
        assert activation is not None
        found = _integers(rewriter, node, values, activation)
    else:
        x = rewriter.as_dtype(node, product.x, torch.float32)
        found = rewriter.call(node, ops.LINEAR, x, *values.arguments)
    if product.bias is not None:
        bias = rewriter.as_dtype(node, product.bias, torch.float32)
        found = rewriter.call(node, aten.add.Tensor, found, bias)
    rewriter.replace(node, rewriter.as_dtype(node, found, node.meta["val"].dtype))
    return integer


def _sums_integers(weight: QuantizedWeight, values: Values, x: QuantizedActivation) -> bool:
    """Whether the product can be one of integers: one scale along K, and integer zero-points."""
    integers = isinstance(weight.spec.element, IntElement) and isinstance(x.spec.element, IntElement)
    plain = stores_float_scales(weight.spec) and stores_float_scales(x.spec)
    zeros = all(spec.symmetric or spec.zero == "int" for spec in (weight.spec, x.spec))
    return integers and plain and zeros and values.groups == 1 and shape_of(x.scale)[-1] == 1


def _integers(rewriter: Rewriter, at: fx.Node, values: Values, x: QuantizedActivation) -> fx.Node:
    codes = rewriter.program.arg(x.node, "codes")
    total = rewriter.call(at, ops.INTEGER_LINEAR, codes, values.codes)
    if x.zero is not None:
        zero = rewriter.as_dtype(at, x.zero, torch.int32)
        total = _less(rewriter, at, total, zero, _sums(rewriter, values))
    if values.zero is not None:
        sums = rewriter.call(at, aten.sum.dim_IntList, rewriter.as_dtype(at, codes, torch.int32), [-1], True)
        sums = rewriter.as_dtype(at, sums, torch.int32)
        if x.zero is not None:
            count = int(shape_of(values.codes)[-1])
            shift = rewriter.call(at, aten.mul.Scalar, rewriter.as_dtype(at, x.zero, torch.int32), count)
            sums = rewriter.call(at, aten.sub.Tensor, sums, shift)
        total = _less(rewriter, at, total, sums, _row(rewriter, at, values.zero, torch.int32))
    scaled = rewriter.call(
        at, aten.mul.Tensor, rewriter.as_dtype(at, total, torch.float32), _float(rewriter, at, x.scale)
    )
    return rewriter.call(at, aten.mul.Tensor, scaled, _row(rewriter, at, values.scale, torch.float32))


def _less(rewriter: Rewriter, at: fx.Node, total: fx.Node, left: fx.Node, right: fx.Node) -> fx.Node:
    return rewriter.call(at, aten.sub.Tensor, total, rewriter.call(at, aten.mul.Tensor, left, right))


def _float(rewriter: Rewriter, at: fx.Node, node: fx.Node) -> fx.Node:
    return rewriter.as_dtype(at, node, torch.float32)


def _row(rewriter: Rewriter, at: fx.Node, column: fx.Node, dtype: torch.dtype) -> fx.Node:
    """A parameter [N, 1] as [N]."""
    flat = rewriter.call(at, aten.view.default, column, [shape_of(column)[0]])
    return rewriter.as_dtype(at, flat, dtype)


def _sums(rewriter: Rewriter, values: Values) -> fx.Node:
    """Σ_k of each row of codes, int32 [N]."""
    key = rewriter.program.key(values.codes)
    base = key.partition("@")[0]

    def compute(codes: Tensor) -> Tensor:
        turned = codes.T if key != base else codes
        return turned.to(torch.int32).sum(-1, dtype=torch.int32)

    return rewriter.derive(f"{key}{SUMS}", (base,), compute, (int(shape_of(values.codes)[0]),), torch.int32)


def lower_rows(rewriter: Rewriter, packing: Packing) -> None:
    """Rewrite every lookup of rows of a quantized table: codes are read, and dequantized as they are."""
    program = rewriter.program
    for node in program.nodes:
        table, index = _row_lookup(rewriter, node)
        weight = match_weight(program, table)
        if weight is None or index is None or len(weight.shape) < 2:
            continue
        values = values_of(rewriter, weight, packing)
        index = rewriter.as_dtype(node, index, torch.int64)
        found = rewriter.call(node, ops.ROWS, index, *values.arguments)
        rewriter.replace(node, rewriter.as_dtype(node, found, node.meta["val"].dtype))
    program.refresh()


def _row_lookup(rewriter: Rewriter, node: fx.Node) -> tuple[Any, Any]:
    """(table, index) where the call takes rows by an integer index; (None, None) where not."""
    program = rewriter.program
    if node.target is aten.embedding.default:
        return program.arg(node, "weight"), program.arg(node, "indices")
    if node.target is aten.index_select.default and program.arg(node, "dim") == 0:
        return node.args[0], program.arg(node, "index")
    if node.target is aten.index.Tensor:
        indices: Any = program.arg(node, "indices")
        if len(indices) == 1 and isinstance(indices[0], fx.Node) and indices[0].meta["val"].dtype != torch.bool:
            return node.args[0], indices[0]
    return None, None


def lower_weight(rewriter: Rewriter, weight: QuantizedWeight, packing: Packing) -> None:
    """Dequantize a weight that no product reads in a form that is known."""
    node = weight.node
    if node.users:
        found = rewriter.call(node, ops.UNPACK, *values_of(rewriter, weight, packing).arguments)
        rewriter.replace(node, rewriter.as_dtype(node, found, node.meta["val"].dtype))


def lower_hadamard(rewriter: Rewriter, node: fx.Node) -> None:
    """A Hadamard transform as products with its Kronecker factors, which all transforms of one size share."""
    program = rewriter.program
    order, block = (int(str(program.arg(node, name))) for name in ("order", "block"))
    inverse = bool(program.arg(node, "inverse"))
    *first, last = orthonormal(order, block, inverse, torch.float32, torch.device("cpu"), 6)
    key = f"hadamard.{order}.{block}" + (".inverse" if inverse else "")
    value = rewriter.as_dtype(node, program.arg(node, "x"), torch.float32)
    runs = shape_of(value)[-1] // block
    value = rewriter.call(node, aten.unflatten.int, value, -1, [runs, *(m.shape[0] for m in first), last.shape[0]])
    value = rewriter.call(node, aten.matmul.default, value, _constant(rewriter, f"{key}.last", last.T.contiguous()))
    for i, matrix in reversed(list(enumerate(first))):
        value = rewriter.call(node, aten.matmul.default, _constant(rewriter, f"{key}.{i}", matrix), value)
        value = rewriter.call(node, aten.flatten.using_ints, value, -2, -1)
    value = rewriter.call(node, aten.flatten.using_ints, value, -2, -1)
    rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))


def _constant(rewriter: Rewriter, key: str, matrix: Tensor) -> fx.Node:
    return rewriter.shared(key, lambda: rewriter.constant(key, matrix))
