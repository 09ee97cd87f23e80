"""What quantized things look like in a program: weights, activations, and the products of the two."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import fx

import qcompile.ops  # noqa: F401  registers torch.ops.qcompile
from qcompile.backends.onnx_qcdq.layout import Layout, layout_of
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr
from qcompile.numerics.spec import QuantSpec

aten = torch.ops.aten
CHOOSE = torch.ops.qcompile.choose_qparams.default
QUANTIZE = torch.ops.qcompile.quantize.default
DEQUANTIZE = torch.ops.qcompile.dequantize.default

_TRANSPOSES = {aten.t.default, aten.numpy_T.default, aten.transpose.int, aten.permute.default}


FLOAT8 = {
    "e4m3fn": torch.float8_e4m3fn,
    "e5m2": torch.float8_e5m2,
    "e4m3fnuz": torch.float8_e4m3fnuz,
    "e5m2fnuz": torch.float8_e5m2fnuz,
}


def float8(spec: QuantSpec) -> torch.dtype | None:
    """The dtype, in torch and in ONNX, whose bit patterns the codes are; None for codes that are no 8-bit floats."""
    return FLOAT8.get(str(spec.element))


@cache
def parse_spec(text: str) -> QuantSpec:
    """`QuantSpec.parse`, remembered: a program has a handful of specs and thousands of uses."""
    return QuantSpec.parse(text)


def shape_of(node: fx.Node) -> tuple[Any, ...]:
    """The node's shape: integers where static, symbolic where not; compare with `same`."""
    return tuple(node.meta["val"].shape)


def same(size: Any, other: Any) -> bool:
    """Whether two sizes are known to be equal; asking a symbolic size itself would record the answer as a condition."""
    return dim_expr(size) == dim_expr(other)


@dataclass(frozen=True, eq=False)
class QuantizedWeight:
    """``dequantize(codes, scale, zero, spec)`` of stored codes."""

    node: fx.Node
    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    spec: QuantSpec

    @property
    def shape(self) -> tuple[int, ...]:
        return shape_of(self.codes)

    @property
    def layout(self) -> Layout:
        """In the layout the codes are stored in."""
        return layout_of(self.shape, shape_of(self.scale))

    @property
    def float_zero(self) -> bool:
        return self.spec.zero == "float"


def match_weight(program: Program, node: Any) -> QuantizedWeight | None:
    """The quantized weight that `node` dequantizes, if it does."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
        return None
    codes, scale, zero = (program.arg(node, name) for name in ("codes", "scale", "zero_point"))
    stored = program.is_weight(codes) and program.is_weight(scale) and (zero is None or program.is_weight(zero))
    if not stored:
        return None
    return QuantizedWeight(node, codes, scale, zero, parse_spec(program.arg(node, "spec")))


def activation_parameters(program: Program) -> set[fx.Node]:
    """The stored scales and zero-points of what is quantized at run time."""
    parts = {program.arg(n, name) for n in program.calls(QUANTIZE) for name in ("scale", "zero_point")}
    return {part for part in parts if program.is_weight(part)}


@dataclass(frozen=True, eq=False)
class QuantizedActivation:
    """``dequantize(quantize(x, scale, zero, spec), scale, zero, spec)``; scale and zero are stored or computed."""

    node: fx.Node
    x: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    spec: QuantSpec
    static: bool


def match_activation(program: Program, node: Any) -> QuantizedActivation | None:
    """The quantization that `node` ends, if it is one of something other than a weight."""
    if not isinstance(node, fx.Node) or node.target is not DEQUANTIZE:
        return None
    codes = program.arg(node, "codes")
    if not isinstance(codes, fx.Node) or codes.target is not QUANTIZE:
        return None
    names = ("scale", "zero_point", "spec")
    if any(program.arg(node, name) != program.arg(codes, name) for name in names):
        return None
    scale, zero = program.arg(codes, "scale"), program.arg(codes, "zero_point")
    spec = parse_spec(program.arg(codes, "spec"))
    return QuantizedActivation(node, program.arg(codes, "x"), scale, zero, spec, program.is_weight(scale))


@dataclass(frozen=True, eq=False)
class Product:
    """``x · W (+ bias)`` with a quantized weight of two dimensions.

    `out_first` says that the weight lies as [N, K] (linear), not as [K, N] (addmm, matmul).
    """

    node: fx.Node
    x: fx.Node
    weight: QuantizedWeight
    out_first: bool
    bias: fx.Node | None

    @property
    def layout(self) -> Layout:
        """The weight's layout once it lies as [K, N], blocked along K if it can be: that is what kernels take."""
        shape, scale = self.weight.shape, shape_of(self.weight.scale)
        return layout_of(shape[::-1], scale[::-1], 0) if self.out_first else layout_of(shape, scale, 0)


def match_product(program: Program, node: fx.Node) -> Product | None:
    """The product with a quantized weight that `node` computes, if it does."""
    bias = None
    if node.target is aten.linear.default:
        x, weight, out_first, bias = *node.args[:2], True, program.arg(node, "bias")
    elif node.target is aten.addmm.default and program.arg(node, "beta") == 1 and program.arg(node, "alpha") == 1:
        (bias, x, weight), out_first = node.args[:3], False
    elif node.target in (aten.mm.default, aten.matmul.default):
        (x, weight), out_first = node.args[:2], False
    else:
        return None
    if isinstance(weight, fx.Node) and weight.target in _TRANSPOSES and _swaps_two(weight):
        weight, out_first = weight.args[0], not out_first
    quantized = match_weight(program, weight)
    if quantized is None or len(quantized.shape) != 2 or not isinstance(x, fx.Node) or len(shape_of(x)) < 2:
        return None
    return Product(node, x, quantized, out_first, bias)


def _swaps_two(node: fx.Node) -> bool:
    """Whether a transposing call exchanges the two axes of a matrix."""
    if len(shape_of(node)) != 2:
        return False
    axes: Sequence[Any] = ()
    if node.target is aten.transpose.int:
        axes = node.args[1:3]
    elif node.target is aten.permute.default:
        axes = node.args[1]  # type: ignore[assignment]
        return [int(a) % 2 for a in axes] == [1, 0]
    return not axes or int(axes[0]) % 2 != int(axes[1]) % 2
