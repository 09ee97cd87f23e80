"""Products with packed weights, as the operators that stand for them.

linear(x, dequantize(W))                            ⟶   weight_only(x, W)
linear(dequantize(quantize(x, s)), dequantize(W))   ⟶   c, s = quantize_rows(x); quantized_linear(c, s, W)
the same, microscaling on both sides                ⟶   c, e = quantize_scaled(x); scaled_linear(c, e, W)
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.matching import Site
from qcompile.backends.triton.ops.quantize_rows import QUANTIZE_ROWS
from qcompile.backends.triton.ops.quantized_linear import QUANTIZED_LINEAR
from qcompile.backends.triton.ops.scaled_linear import QUANTIZE_SCALED, SCALED_LINEAR
from qcompile.backends.triton.ops.weight_only import WEIGHT_ONLY
from qcompile.backends.triton.storing import Operands, PackedWeight, outputs_of, store

aten = torch.ops.aten


def lower_products(rewriter: Rewriter, sites: Sequence[Site], index: list[PackedWeight]) -> None:
    """Replace products that become one operator."""
    first, operands = sites[0], store(rewriter, sites, index)
    value = _operator(rewriter, first, operands)
    _share(rewriter, sites, value)


def _operator(rewriter: Rewriter, site: Site, operands: Operands) -> fx.Node:
    node, dtype = site.product.node, site.product.node.meta["val"].dtype
    if site.activation is None:
        return rewriter.call(node, WEIGHT_ONLY, site.x, *operands.arguments())
    if site.kind == "mx":
        codes, exponents = _codes(rewriter, site, QUANTIZE_SCALED, site.form.element)
        parts = (operands.planes, operands.scale, operands.bias, operands.format)
        return rewriter.call(node, SCALED_LINEAR, codes, exponents, *parts, dtype)
    codes, scale = _codes(rewriter, site, QUANTIZE_ROWS, None, 0.0, str(site.activation.spec))
    parts_8 = (operands.planes, operands.scale, operands.factor, operands.bias, operands.format)
    return rewriter.call(node, QUANTIZED_LINEAR, codes, scale, *parts_8, dtype)


def _codes(rewriter: Rewriter, site: Site, op: Callable[..., Any], *options: Any) -> tuple[fx.Node, fx.Node]:
    """The two results of a quantizing operator, made once for all products that read them."""

    def make() -> fx.Node:
        return rewriter.call(site.product.node, op, site.x, *options)

    made = rewriter.shared((op, site.x, options), make)

    def part(i: int) -> fx.Node:
        return rewriter.shared((made, i), lambda: rewriter.call(site.product.node, operator.getitem, made, i))

    return part(0), part(1)


def _share(rewriter: Rewriter, sites: Sequence[Site], value: fx.Node) -> None:
    """Let the readers of each product read its part of `value`."""
    if len(sites) == 1:
        rewriter.replace(sites[0].product.node, value)
        return
    node = sites[0].product.node
    sizes = [outputs_of(site) for site in sites]
    split = rewriter.call(node, aten.split_with_sizes.default, value, sizes, -1)
    parts = [rewriter.call(node, operator.getitem, split, i) for i in range(len(sites))]
    for site, part in zip(sites, parts, strict=True):
        rewriter.replace(site.product.node, part)
