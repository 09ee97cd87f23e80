"""quantize and dequantize of activations, in ONNX operators.

A scale that ONNX can hold next to the operator (per tensor, per channel) is given to QuantizeLinear itself. A scale
computed at run time divides first, and QuantizeLinear rounds by a scale of one:

    q = quantize(x, s, z, spec)     ⟶     q = Q(x / s, 1)                     symmetric
                                          q = Q(round(x / s) + z, 1)          with a zero-point

onnxruntime has integer kernels for that (scale one is a constant); it has none for a scale that is computed.
Codes of fewer than 8 bits lie in int8 or uint8: the values are clipped in floating point before Q, to the same codes.
8-bit floats are casts, which onnxruntime computes exactly and fuses with nothing:

    q = quantize(x, s, None, spec)  ⟶     q = Cast(Clip(x / s))
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.layout import PER_TENSOR, Layout
from qcompile.backends.onnx_qcdq.recognise import float8, parse_spec, same, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec

Q, DQ = ops.QUANTIZE_LINEAR, ops.DEQUANTIZE_LINEAR


@dataclass(frozen=True, eq=True)
class Parameters:
    """What an activation is quantized by; scale and zero-point are stored or computed."""

    scale: fx.Node
    zero: fx.Node | None
    spec: QuantSpec

    @classmethod
    def of(cls, program: Program, node: fx.Node) -> Parameters:
        """Those of a quantize or dequantize call."""
        scale, zero, text = (program.arg(node, name) for name in ("scale", "zero_point", "spec"))
        return cls(scale, zero, parse_spec(text))

    @property
    def partial_range(self) -> bool:
        """Whether the container holds codes that the spec does not use, so that something must clip."""
        limits = torch.iinfo(self.spec.storage)
        return (self.spec.qmin, self.spec.qmax) != (limits.min, limits.max)


# ---------------------------------------------------------------- quantize


def lower_quantize(rewriter: Rewriter, node: fx.Node, qcdq: bool) -> None:
    """Replace a quantize call; `qcdq` gives QuantizeLinear the scale wherever it can, and clips codes, not values."""
    program = rewriter.program
    x, by = program.arg(node, "x"), Parameters.of(program, node)
    layout, float_dtype = _layout(program, x, by, qcdq), float8(by.spec)
    x = rewriter.as_dtype(node, x, torch.float32)
    if float_dtype is not None:
        largest = by.spec.element.largest
        value = rewriter.call(node, aten.clamp.default, steps(rewriter, node, x, by), -largest, largest)
        codes = rewriter.call(node, aten.to.dtype, value, float_dtype)
    elif layout is None:
        value = steps(rewriter, node, x, by)
        codes = rewriter.call(node, Q, value, *unit(rewriter, node, by.spec), -1, 0, by.spec.signed)
    else:
        if by.partial_range and not qcdq:
            x = clip_values(rewriter, node, x, by)
        parameters = linear_parameters(rewriter, node, by, layout)
        codes = rewriter.call(node, Q, x, *parameters, layout.axis, layout.block_size, by.spec.signed)
        if by.partial_range and qcdq:
            codes = rewriter.call(node, aten.clamp.default, codes, by.spec.qmin, by.spec.qmax)
    if len(shape_of(codes)) > len(shape_of(x)):
        codes = rewriter.call(node, aten.flatten.using_ints, codes, -2, -1)
    rewriter.replace(node, codes)


def steps(rewriter: Rewriter, at: fx.Node, x: fx.Node, by: Parameters) -> fx.Node:
    """``x / scale`` (rounded, plus zero) clipped to the codes in use: float32, not yet codes, grouped as by `split`."""
    x, group = split(rewriter, at, x, by.scale)
    value = rewriter.call(at, aten.div.Tensor, x, spread(rewriter, at, by.scale, group))
    if by.zero is not None:
        if by.spec.zero == "int":
            value = rewriter.call(at, aten.round.default, value)
        value = rewriter.call(at, aten.add.Tensor, value, spread(rewriter, at, by.zero, group))
    if by.partial_range:
        value = rewriter.call(at, aten.clamp.default, value, float(by.spec.qmin), float(by.spec.qmax))
    return value


def clip_values(rewriter: Rewriter, at: fx.Node, x: fx.Node, by: Parameters) -> fx.Node:
    """`x` (float32) limited to what the codes in use stand for, by a stored scale."""
    keys = tuple(rewriter.program.key(p) for p in (by.scale, by.zero) if p is not None)
    shape = shape_of(by.scale) if any(size > 1 for size in shape_of(by.scale)) else ()

    def limits(scale: Tensor, zero: Tensor | None) -> list[Tensor]:
        offset = 0.0 if zero is None else zero.to(torch.float32)
        return [((code - offset) * scale.to(torch.float32)).reshape(shape) for code in (by.spec.qmin, by.spec.qmax)]

    def lowest(scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return torch.minimum(*limits(scale, zero))  # a negative scale turns the limits round

    def highest(scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return torch.maximum(*limits(scale, zero))

    low = rewriter.derive(f"{keys[0]}.lowest", keys, lowest, shape, torch.float32)
    high = rewriter.derive(f"{keys[0]}.highest", keys, highest, shape, torch.float32)
    return rewriter.call(at, ops.CLIP, x, low, high)


# ---------------------------------------------------------------- dequantize


def lower_dequantize(rewriter: Rewriter, node: fx.Node, product_reader: bool, qcdq: bool) -> None:
    """Replace a dequantize call of computed codes.

    With `product_reader`, a product that dequantizes its weight reads the result: the scale is then multiplied after a
    DequantizeLinear by one, for onnxruntime leaves that product's weight packed only if no DequantizeLinear feeds it.
    Where none does, DequantizeLinear gets no zero-point of int8: onnxruntime 1.32 moves it behind views and transposes
    with a QuantizeLinear to int8 in front, makes the zero-point uint8 in the next step, and refuses its own graph.
    """
    program = rewriter.program
    codes, by = program.arg(node, "codes"), Parameters.of(program, node)
    layout = _layout(program, codes, by, qcdq)
    alone = product_reader and not qcdq and layout is not None and layout.per_tensor
    no_zero = by.spec.signed and not product_reader
    if layout is None or alone or (no_zero and by.zero is not None):
        value = _dequantize_steps(rewriter, node, codes, by)
    else:
        scale, zero = linear_parameters(rewriter, node, by, layout)
        value = rewriter.call(node, DQ, codes, scale, None if no_zero else zero, layout.axis, layout.block_size)
    rewriter.replace(node, rewriter.as_dtype(node, value, node.meta["val"].dtype))


def _dequantize_steps(rewriter: Rewriter, at: fx.Node, codes: fx.Node, by: Parameters) -> fx.Node:
    """``(codes - zero) * scale``, with a DequantizeLinear by one for the conversion."""
    codes, group = split(rewriter, at, codes, by.scale)
    if float8(by.spec) is None:
        value = rewriter.call(at, DQ, codes, *unit(rewriter, at, by.spec), -1, 0)
    else:
        value = rewriter.as_dtype(at, codes, torch.float32)
    if by.zero is not None:
        value = rewriter.call(at, aten.sub.Tensor, value, spread(rewriter, at, by.zero, group))
    value = rewriter.call(at, aten.mul.Tensor, value, spread(rewriter, at, by.scale, group))
    return rewriter.call(at, aten.flatten.using_ints, value, -2, -1) if group else value


# ---------------------------------------------------------------- parameters


def unit(rewriter: Rewriter, at: fx.Node, spec: QuantSpec) -> tuple[fx.Node, fx.Node]:
    """A scale of one and a zero-point of zero, of their own names: onnxruntime merges calls that share them."""
    name = rewriter.program.module_of(at) or at.name
    scale = rewriter.constant(f"{name}.unit_scale", torch.tensor(1.0))
    return scale, rewriter.constant(f"{name}.unit_zero", torch.tensor(0, dtype=spec.storage))


def _layout(program: Program, operand: fx.Node, by: Parameters, qcdq: bool) -> Layout | None:
    """How QuantizeLinear takes the scale, if it can: a stored one per tensor or channel; with `qcdq` a computed one."""
    if by.spec.zero == "float" or float8(by.spec) is not None:
        return None
    sizes, operand_sizes = shape_of(by.scale), shape_of(operand)
    stored = program.is_weight(by.scale)
    if all(same(size, 1) for size in sizes):
        return PER_TENSOR if stored or qcdq else None
    full = [axis for axis, size in enumerate(sizes) if not same(size, 1)]
    if stored and len(full) == 1 and same(operand_sizes[full[0]], sizes[full[0]]):
        return Layout(full[0], 0, (int(sizes[full[0]]),))
    width, scales = operand_sizes[-1], sizes[-1]
    leading = zip(operand_sizes[:-1], sizes[:-1], strict=True)
    if stored or not qcdq or not isinstance(width, int) or not isinstance(scales, int):
        return None
    return Layout(len(sizes) - 1, width // scales, sizes) if all(same(a, b) for a, b in leading) else None


def linear_parameters(
    rewriter: Rewriter, at: fx.Node, by: Parameters, layout: Layout
) -> tuple[fx.Node, fx.Node | None]:
    """Scale (float32) and zero-point for Q and DQ; stored ones under names of their own for each reader."""
    if rewriter.program.is_weight(by.scale):
        scale = rewriter.as_dtype(at, _own(rewriter, at, by.scale, layout), torch.float32)
        if by.zero is not None:
            return scale, _own(rewriter, at, by.zero, layout)
        nought = torch.zeros(layout.shape, dtype=by.spec.storage)
        return scale, rewriter.constant(f"{rewriter.program.key(by.scale)}.zero_point", nought)
    scale, zero = by.scale, by.zero
    if layout.per_tensor:
        scale = _scalar(rewriter, at, scale)
        zero = None if zero is None else _scalar(rewriter, at, zero)
    return rewriter.as_dtype(at, scale, torch.float32), zero


def _scalar(rewriter: Rewriter, at: fx.Node, value: fx.Node) -> fx.Node:
    """A computed value of one element with rank 0, the same for all its readers."""
    return rewriter.shared((value, "scalar"), lambda: rewriter.call(at, aten.reshape.default, value, []))


def _own(rewriter: Rewriter, at: fx.Node, parameter: fx.Node, layout: Layout) -> fx.Node:
    key = rewriter.program.key(parameter)
    _, dtype = rewriter.source.meta(key)
    return rewriter.derive(f"{key}@{at.name}", (key,), layout.apply, layout.shape, dtype)


def split(rewriter: Rewriter, at: fx.Node, x: fx.Node, scale: fx.Node) -> tuple[fx.Node, bool]:
    """`x` with its last axis as [groups, size], and True, where a scale holds for a group along it."""
    width, scales = shape_of(x)[-1], shape_of(scale)[-1]
    if not isinstance(width, int) or not isinstance(scales, int) or scales in (1, width):
        return x, False
    return rewriter.call(at, aten.unflatten.int, x, -1, [scales, width // scales]), True


def spread(rewriter: Rewriter, at: fx.Node, parameter: fx.Node, group: bool) -> fx.Node:
    """A scale or zero-point as float32 that broadcasts against `split`'s result."""
    parameter = rewriter.as_dtype(at, parameter, torch.float32)
    return rewriter.call(at, aten.unsqueeze.default, parameter, -1) if group else parameter
