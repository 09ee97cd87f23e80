"""From a program to one whose quantized parts are ONNX operators (`ops`), still a program that runs.

First the products with quantized weights, then rows gathered from quantized tables, then whatever else quantizes, then
Hadamard transforms.
Weights are not read: the ones that change layout are derived when they are written.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import fx

from qcompile.backends.onnx_qcdq import gathers, ops
from qcompile.backends.onnx_qcdq.activations import lower_dequantize, lower_quantize
from qcompile.backends.onnx_qcdq.hadamard import lower_hadamard
from qcompile.backends.onnx_qcdq.products import dequantize_linear, lower_product
from qcompile.backends.onnx_qcdq.qparams import lower_choose_qparams, merge_equal
from qcompile.backends.onnx_qcdq.recognise import CHOOSE, DEQUANTIZE, QUANTIZE, match_product, match_weight
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten, base_key
from qcompile.hadamard import HADAMARD
from qcompile.ir.program import Program
from qcompile.numerics.element import IntElement
from qcompile.numerics.spec import QuantSpec

_SHIFTS = (aten.bitwise_left_shift.Tensor_Scalar, aten.bitwise_right_shift.Tensor_Scalar)


@dataclass(frozen=True)
class Prelowered:
    """The rewritten program, and what was found in it."""

    program: Program
    products: int  # with a quantized weight
    integer_products: int  # of those, the ones whose activation is quantized in a form with integer kernels
    bits: dict[str, int]  # key of codes and zero-points of a weight that is dequantized as it is → bits of one code
    signed: dict[str, bool]  # key of codes in the original program → whether they are
    original: dict[str, str]  # name of a call here → name of the call it stands for in the program


def prelower(program: Program, style: str = "fused") -> Prelowered:
    """Rewrite a copy of `program`; see the file's first lines. `style` as in `OnnxQcdqBackend`."""
    rewriter = Rewriter(program)
    merge_equal(rewriter)
    specs = _specs(rewriter.program)
    bits = {key: spec.bits for key, spec in specs.items() if isinstance(spec.element, IntElement)}
    products = [p for node in rewriter.program.nodes if (p := match_product(rewriter.program, node)) is not None]
    integer = sum([lower_product(rewriter, product, style == "fused") for product in products])
    rewriter.program.refresh()
    gathers.lower_gathers(rewriter)
    _lower_weights(rewriter)
    for node in rewriter.program.calls(QUANTIZE):
        lower_quantize(rewriter, node, style == "qcdq")
    for node in rewriter.program.calls(DEQUANTIZE):
        lower_dequantize(rewriter, node, _feeds_product(node), style == "qcdq")
    for node in rewriter.program.calls(CHOOSE):
        lower_choose_qparams(rewriter, node)
    for node in rewriter.program.calls(HADAMARD):
        lower_hadamard(rewriter, node)
    _lower_shifts(rewriter)
    rewriter.program.refresh()
    return Prelowered(
        rewriter.program,
        len(products),
        integer,
        _sub_byte(rewriter.program, bits),
        {key: spec.signed for key, spec in specs.items()},
        rewriter.original,
    )


def _specs(program: Program) -> dict[str, QuantSpec]:
    """Key of a weight's codes → what they are."""
    weights = [match_weight(program, node) for node in program.calls(DEQUANTIZE)]
    return {program.key(weight.codes): weight.spec for weight in weights if weight is not None}


def _sub_byte(program: Program, bits: dict[str, int]) -> dict[str, int]:
    """The weights that go straight into a DequantizeLinear, and so may lie packed, by their keys here."""
    found: dict[str, int] = {}
    for node in program.calls(ops.DEQUANTIZE_LINEAR):
        codes, zero = program.arg(node, "codes"), program.arg(node, "zero_point")
        width = bits.get(base_key(program.key(codes))) if program.is_weight(codes) else None
        if width is not None:
            found.update({program.key(part): width for part in (codes, zero) if part is not None})
    return found


def _lower_weights(rewriter: Rewriter) -> None:
    """Dequantize the weights that no product reads in the layout they are stored in."""
    for node in rewriter.program.calls(DEQUANTIZE):
        weight = match_weight(rewriter.program, node)
        if weight is None or weight.float_zero:
            continue  # a float zero-point is written out like that of an activation
        value = dequantize_linear(rewriter, node, weight, weight.layout, transposed=False)
        rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))


def _lower_shifts(rewriter: Rewriter) -> None:
    """Shift bytes as they are: the exporter takes them for signed, and writes types that do not fit together."""
    for node in rewriter.program.calls(*_SHIFTS):
        x, bits = node.args
        if isinstance(bits, int) and node.meta["val"].dtype == torch.uint8:
            left = node.target is _SHIFTS[0]
            rewriter.replace(node, rewriter.call(node, ops.BIT_SHIFT, x, bits, left))


def _feeds_product(node: fx.Node) -> bool:
    """Whether a product that dequantizes its weight reads the node, perhaps through a cast or with an axis in front."""
    between = (aten.to.dtype, aten.unsqueeze.default)
    readers = [r for user in node.users for r in (user.users if user.target in between else [user])]
    return any(reader.target is ops.MATMUL for reader in readers)
