"""What of a program the kernels take: products with packed weights, and how their activations come."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.recognise import (
    DEQUANTIZE,
    Product,
    QuantizedActivation,
    QuantizedWeight,
    match_product,
    match_weight,
    shape_of,
)
from qcompile.backends.triton.formats import WeightFormat, format_of
from qcompile.ir.program import Program

Kind: TypeAlias = Literal["weight_only", "int8", "fp8", "mx"]

FLOATS = (torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, eq=False)
class Site:
    """A product that becomes a kernel. `kind` says which; `activation` is what it quantizes, None for weight_only."""

    product: Product
    form: WeightFormat
    kind: Kind = "weight_only"
    activation: QuantizedActivation | None = None
    reason: str | None = None  # why a quantized activation stays simulated

    @property
    def x(self) -> fx.Node:
        """What the kernel reads now, before any quantization that it does itself: products before this one may have
        been replaced since it was matched."""
        node = self.product.node
        if self.activation is not None:
            node = self.activation.node.args[0]  # type: ignore[assignment]  # its codes, made of x
        value = node.args[1] if node.target is torch.ops.aten.addmm.default else node.args[0]
        assert isinstance(value, fx.Node)
        return value


@dataclass(frozen=True)
class Left:
    """A product with a quantized weight that stays in torch, and why."""

    node: fx.Node
    weight: str
    reason: str


def outer_of(program: Program, weight: QuantizedWeight) -> list[fx.Node]:
    """The outer parameters that a weight is dequantized with."""
    return list(program.arg(weight.node, "outer") or ())


def weight_name(program: Program, weight: QuantizedWeight) -> str:
    """The name that a weight had before it became codes."""
    return program.key(weight.codes).removesuffix(".codes")


def match_sites(program: Program) -> tuple[list[Site], list[Left]]:
    """Every product with a quantized weight, as a site or as what is left and why."""
    from qcompile.backends.triton.activations import kernel_for

    sites, left = [], []
    for node in program.nodes:
        product = match_product(program, node)
        if product is None:
            continue
        found = _site(program, product)
        if isinstance(found, str):
            left.append(Left(node, weight_name(program, product.weight), found))
            continue
        sites.append(kernel_for(program, found))
    return sites, left


def _site(program: Program, product: Product) -> Site | str:
    dtype = product.node.meta["val"].dtype
    if dtype not in FLOATS or product.x.meta["val"].dtype != dtype:
        return f"kernels compute in float32, float16 and bfloat16, not in {dtype}"
    if not all(program.is_weight(outer) for outer in outer_of(program, product.weight)):
        return "an outer parameter of the weight is computed as it runs"
    if product.bias is not None and not program.is_weight(product.bias):
        return "its bias is computed as it runs"
    form = weight_format(product.weight, product.out_first)
    return form if isinstance(form, str) else Site(product, form)


def weight_format(weight: QuantizedWeight, out_first: bool) -> WeightFormat | str:
    """The format of a weight's last two axes as [N, K], or why there is none."""
    shape, scale = weight.shape[-2:], shape_of(weight.scale)[-2:]
    if not out_first:
        shape, scale = shape[::-1], scale[::-1]
    return format_of(weight.spec, (int(shape[0]), int(shape[1])), (int(scale[0]), int(scale[1])))


def quantized_weights(program: Program) -> list[QuantizedWeight]:
    """Every stored weight that is dequantized."""
    found = [match_weight(program, node) for node in program.calls(DEQUANTIZE)]
    return [weight for weight in found if weight is not None]
