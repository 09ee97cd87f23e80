"""quantize and dequantize of activations, in ONNX operators.

A scale that ONNX can hold next to the operator (per tensor, per channel) is given to QuantizeLinear itself. A scale
computed at run time divides first, and QuantizeLinear rounds by a scale of one:

    q = quantize(x, s, z, spec)     ⟶     q = Q(x / s, 1)                     symmetric
                                          q = Q(round(x / s) + z, 1)          with a zero-point

onnxruntime has integer kernels for that (scale one is a constant); it has none for a scale that is computed.
Codes of fewer than 8 bits lie in int8 or uint8: the values are clipped in floating point before Q, to the same codes.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.layout import Layout
from qcompile.backends.onnx_qcdq.recognise import parse_spec, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.numerics.spec import QuantSpec

Q, DQ = ops.QUANTIZE_LINEAR, ops.DEQUANTIZE_LINEAR


def static_layout(rewriter: Rewriter, x: fx.Node, scale: fx.Node) -> Layout | None:
    """The layout of a stored scale that is per tensor or per channel of `x`; None for any other scale."""
    if not rewriter.program.is_weight(scale):
        return None
    sizes = shape_of(scale)
    full = [axis for axis, size in enumerate(sizes) if size > 1]
    if not full:
        return Layout(0, 0, ())
    if len(full) == 1 and shape_of(x)[full[0]] == sizes[full[0]]:
        return Layout(full[0], 0, (int(sizes[full[0]]),))
    return None


def partial_range(spec: QuantSpec) -> bool:
    """Whether the container holds codes that `spec` does not use, so that something must clip."""
    limits = torch.iinfo(spec.storage)
    return (spec.qmin, spec.qmax) != (limits.min, limits.max)


def one(rewriter: Rewriter, name: str, spec: QuantSpec) -> tuple[fx.Node, fx.Node]:
    """A scale of one and a zero-point of zero, of their own names: onnxruntime merges calls that share them."""
    scale = rewriter.constant(f"{name}.unit_scale", torch.tensor(1.0))
    return scale, rewriter.constant(f"{name}.unit_zero", torch.tensor(0, dtype=spec.storage))


def steps(
    rewriter: Rewriter, at: fx.Node, x: fx.Node, scale: fx.Node, zero: fx.Node | None, spec: QuantSpec
) -> fx.Node:
    """``x / scale`` (rounded, plus zero) clipped to the codes in use, float32, not yet codes; grouped as `split` does."""
    x = rewriter.as_dtype(at, x, torch.float32)
    x, group = split(rewriter, at, x, scale)
    value = rewriter.call(at, aten.div.Tensor, x, spread(rewriter, at, scale, group))
    if zero is not None:
        if spec.zero == "int":
            value = rewriter.call(at, aten.round.default, value)
        value = rewriter.call(at, aten.add.Tensor, value, spread(rewriter, at, zero, group))
    if partial_range(spec):
        value = rewriter.call(at, aten.clamp.default, value, float(spec.qmin), float(spec.qmax))
    return value


def split(rewriter: Rewriter, at: fx.Node, x: fx.Node, scale: fx.Node) -> tuple[fx.Node, bool]:
    """`x` with its last axis as [groups, size], where a scale holds for a group along it."""
    width, scales = shape_of(x)[-1], shape_of(scale)[-1]
    if not isinstance(width, int) or not isinstance(scales, int) or scales in (1, width):
        return x, False
    return rewriter.call(at, aten.unflatten.int, x, -1, [scales, width // scales]), True


def spread(rewriter: Rewriter, at: fx.Node, parameter: fx.Node, group: bool) -> fx.Node:
    """A scale or zero-point as float32 that broadcasts against `split`'s result."""
    parameter = rewriter.as_dtype(at, parameter, torch.float32)
    return rewriter.call(at, aten.unsqueeze.default, parameter, -1) if group else parameter


def lower_quantize(rewriter: Rewriter, node: fx.Node, clip_codes: bool) -> None:
    """Replace a quantize call; `clip_codes` clips codes after Q (the qcdq style) instead of values before."""
    program = rewriter.program
    x, scale, zero = (program.arg(node, name) for name in ("x", "scale", "zero_point"))
    spec = parse_spec(program.arg(node, "spec"))
    layout = static_layout(rewriter, x, scale)
    if layout is None and clip_codes:
        layout = _computed_layout(x, scale)
    if layout is not None and spec.zero != "float":
        codes = _quantize_by(rewriter, node, x, scale, zero, spec, layout, clip_codes)
    else:
        value = steps(rewriter, node, x, scale, zero, spec)
        unit = one(rewriter, program.module_of(node) or node.name, spec)
        codes = rewriter.call(node, Q, value, *unit, -1, 0, spec.signed)
        if len(shape_of(codes)) > len(shape_of(x)):
            codes = rewriter.call(node, aten.flatten.using_ints, codes, -2, -1)
    rewriter.replace(node, codes)


def _computed_layout(x: fx.Node, scale: fx.Node) -> Layout | None:
    """The layout of a scale that is computed: per tensor, per token [.., 1] or per group [.., groups]; else None."""
    if all(size == 1 for size in shape_of(scale)):
        return Layout(0, 0, ())
    width, scales = shape_of(x)[-1], shape_of(scale)[-1]
    leading = zip(shape_of(x)[:-1], shape_of(scale)[:-1], strict=True)
    if not isinstance(width, int) or not isinstance(scales, int) or any(a is not b and a != b for a, b in leading):
        return None
    return Layout(len(shape_of(x)) - 1, width // scales, (1,))


def _quantize_by(
    rewriter: Rewriter,
    at: fx.Node,
    x: fx.Node,
    scale: fx.Node,
    zero: fx.Node | None,
    spec: QuantSpec,
    layout: Layout,
    clip_codes: bool,
) -> fx.Node:
    """QuantizeLinear by the scale itself."""
    x = rewriter.as_dtype(at, x, torch.float32)
    stored = rewriter.program.is_weight(scale)
    if stored and partial_range(spec) and not clip_codes:
        x = clip_values(rewriter, at, x, scale, zero, spec)
    make = linear_parameters if stored else computed_parameters
    scale, zero = make(rewriter, at, scale, zero, spec, layout)
    codes = rewriter.call(at, Q, x, scale, zero, layout.axis, layout.block_size, spec.signed)
    if partial_range(spec) and clip_codes:
        codes = rewriter.call(at, aten.clamp.default, codes, spec.qmin, spec.qmax)
    return codes


def linear_parameters(
    rewriter: Rewriter, at: fx.Node, scale: fx.Node, zero: fx.Node | None, spec: QuantSpec, layout: Layout
) -> tuple[fx.Node, fx.Node | None]:
    """A stored scale (float32) and zero-point for Q and DQ, under names of their own for each reader."""
    zero_node = _own(rewriter, at, zero, layout) if zero is not None else None
    if zero_node is None:
        key = f"{rewriter.program.key(scale)}.zero_point"
        zero_node = rewriter.constant(key, torch.zeros(layout.shape, dtype=spec.storage))
    return rewriter.as_dtype(at, _own(rewriter, at, scale, layout), torch.float32), zero_node


def computed_parameters(
    rewriter: Rewriter, at: fx.Node, scale: fx.Node, zero: fx.Node | None, spec: QuantSpec, layout: Layout
) -> tuple[fx.Node, fx.Node | None]:
    """A scale (float32) and zero-point that are computed, for Q and DQ."""
    scale = rewriter.as_dtype(at, scale, torch.float32)
    if layout.blocked:
        return scale, zero
    flat = [None if p is None else rewriter.call(at, aten.reshape.default, p, []) for p in (scale, zero)]
    assert flat[0] is not None
    return flat[0], flat[1]


def _own(rewriter: Rewriter, at: fx.Node, parameter: fx.Node, layout: Layout) -> fx.Node:
    key = rewriter.program.key(parameter)
    _, dtype = rewriter.source.meta(key)
    return rewriter.derive(f"{key}@{at.name}", (key,), layout.apply, layout.shape, dtype)


def clip_values(
    rewriter: Rewriter, at: fx.Node, x: fx.Node, scale: fx.Node, zero: fx.Node | None, spec: QuantSpec
) -> fx.Node:
    """`x` (float32) limited to what the codes in use stand for, by a stored scale."""
    keys = tuple(rewriter.program.key(p) for p in (scale, zero) if p is not None)
    shape = shape_of(scale) if any(size > 1 for size in shape_of(scale)) else ()

    def limits(scale: Tensor, zero: Tensor | None) -> list[Tensor]:
        offset = 0.0 if zero is None else zero.to(torch.float32)
        return [((code - offset) * scale.to(torch.float32)).reshape(shape) for code in (spec.qmin, spec.qmax)]

    def lowest(scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return torch.minimum(*limits(scale, zero))  # a negative scale turns the limits round

    def highest(scale: Tensor, zero: Tensor | None = None) -> Tensor:
        return torch.maximum(*limits(scale, zero))

    low = rewriter.derive(f"{keys[0]}.lowest", keys, lowest, shape, torch.float32)
    high = rewriter.derive(f"{keys[0]}.highest", keys, highest, shape, torch.float32)
    return rewriter.call(at, ops.CLIP, x, low, high)


def lower_dequantize(rewriter: Rewriter, node: fx.Node, product_reader: bool, qcdq: bool) -> None:
    """Replace a dequantize call of computed codes.

    With `product_reader`, a product that dequantizes its weight reads the result: the scale is then multiplied after a
    DequantizeLinear by one, for onnxruntime leaves that product's weight packed only if no DequantizeLinear feeds it.
    """
    program = rewriter.program
    codes, scale, zero = (program.arg(node, name) for name in ("codes", "scale", "zero_point"))
    spec, dtype = parse_spec(program.arg(node, "spec")), node.meta["val"].dtype
    layout = static_layout(rewriter, codes, scale)
    if layout is None and qcdq:
        layout = _computed_layout(codes, scale)
    if layout is not None and spec.zero != "float" and (qcdq or not (product_reader and layout.per_tensor)):
        value = _dequantize_by(rewriter, node, codes, scale, zero, spec, layout)
    else:
        value = _dequantize_steps(rewriter, node, codes, scale, zero, spec)
    rewriter.replace(node, rewriter.as_dtype(node, value, dtype))


def _dequantize_by(
    rewriter: Rewriter,
    at: fx.Node,
    codes: fx.Node,
    scale: fx.Node,
    zero: fx.Node | None,
    spec: QuantSpec,
    layout: Layout,
) -> fx.Node:
    make = linear_parameters if rewriter.program.is_weight(scale) else computed_parameters
    own_scale, own_zero = make(rewriter, at, scale, zero, spec, layout)
    return rewriter.call(at, DQ, codes, own_scale, own_zero, layout.axis, layout.block_size)


def _dequantize_steps(
    rewriter: Rewriter, at: fx.Node, codes: fx.Node, scale: fx.Node, zero: fx.Node | None, spec: QuantSpec
) -> fx.Node:
    """``(codes - zero) * scale`` with a scale that is computed or stands after DequantizeLinear by one."""
    codes, group = split(rewriter, at, codes, scale)
    unit, nought = one(rewriter, rewriter.program.module_of(at) or at.name, spec)
    value = rewriter.call(at, DQ, codes, unit, nought, -1, 0)
    if zero is not None:
        value = rewriter.call(at, aten.sub.Tensor, value, spread(rewriter, at, zero, group))
    value = rewriter.call(at, aten.mul.Tensor, value, spread(rewriter, at, scale, group))
    return rewriter.call(at, aten.flatten.using_ints, value, -2, -1) if group else value
