"""choose_qparams of an activation, written out in plain operators.

    s, z = choose_qparams(x, spec)     ⟶     s = amax(|x|) / c;  or  s = (max - min) / n,  z = round(qmin - min / s)

The formulas are those of `qcompile.numerics.params`. A group of zeros gets the least scale here and 1 there: both give
codes that dequantize to exactly 0.
"""

from __future__ import annotations

import operator

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.recognise import CHOOSE, DEQUANTIZE, QUANTIZE, parse_spec, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter, aten
from qcompile.numerics.criterion import AbsMax, MinMax
from qcompile.numerics.element import IntElement
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor
from qcompile.numerics.scale_type import FloatScale, scaling_min
from qcompile.numerics.spec import QuantSpec


def why_not(spec: QuantSpec, rank: int) -> str | None:
    """Why parameters of `spec` cannot be chosen at run time, and the way out; None where they can."""
    if not isinstance(spec.observer, AbsMax | MinMax):
        return f"{spec}: observer {spec.observer} at run time has no ONNX form; use absmax or minmax, or static"
    if not isinstance(spec.scale, FloatScale):
        return f"{spec}: {spec.scale} scales at run time have no ONNX form; use scale=f32"
    if spec.scaling_min is not None and spec.range == "signed":
        return f"{spec}: scaling_min has no ONNX form where scales have a sign; use range=half"
    if spec.when == "no_scale":
        return f"{spec}: a cast without scales has no ONNX form; use token or tensor dynamic"
    if isinstance(spec.granularity, PerBlock):
        return f"{spec}: {spec.granularity} at run time has no ONNX form; use token or group="
    if isinstance(spec.granularity, PerGroup) and spec.granularity.axis % rank != rank - 1:
        return f"{spec}: groups at run time lie along the last axis only; drop axis="
    return None


def merge_equal(rewriter: Rewriter) -> None:
    """Let equal choose_qparams, quantize and dequantize calls of computed values be one call each."""
    program, seen = rewriter.program, dict[object, fx.Node]()
    for node in program.nodes:
        if node.target not in (CHOOSE, QUANTIZE, DEQUANTIZE, operator.getitem):
            continue
        key = (node.target, node.args, tuple(sorted(node.kwargs.items())))
        if key in seen:
            rewriter.program.replace(node, seen[key])
        else:
            seen[key] = node


def lower_choose_qparams(rewriter: Rewriter, node: fx.Node) -> None:
    """Replace a call and its getitems."""
    x, text = rewriter.program.arg(node, "x"), rewriter.program.arg(node, "spec")
    spec = parse_spec(text)
    scale, zero = _parameters(rewriter, node, rewriter.as_dtype(node, x, torch.float32), spec)
    for user in list(node.users):
        part = scale if user.args[1] == 0 else zero
        assert user.target is operator.getitem
        assert part is not None
        rewriter.replace(user, part)
    rewriter.program.graph.erase_node(node)


def _parameters(rewriter: Rewriter, at: fx.Node, x: fx.Node, spec: QuantSpec) -> tuple[fx.Node, fx.Node | None]:
    axes, keep = _axes(spec, len(shape_of(x)))
    if isinstance(spec.granularity, PerGroup):
        size = spec.granularity.size
        x = rewriter.call(at, aten.unflatten.int, x, -1, [shape_of(x)[-1] // size, size])
    if not spec.symmetric:
        return _asymmetric(rewriter, at, x, spec, axes, keep)
    step = _symmetric(rewriter, at, x, spec, axes, keep)
    return rewriter.as_dtype(at, step, spec.scale_dtype), None


def _symmetric(rewriter: Rewriter, at: fx.Node, x: fx.Node, spec: QuantSpec, axes: list[int], keep: bool) -> fx.Node:
    if spec.range == "signed" and spec.signed:
        return _signed_step(rewriter, at, x, spec, axes, keep)
    if spec.has_negatives:
        x = rewriter.call(at, aten.abs.default, x)
    largest = rewriter.call(at, aten.amax.default, x, axes, keep)
    step = rewriter.call(at, aten.div.Tensor, largest, _divisor(spec))
    return rewriter.call(at, aten.clamp.default, step, _least(spec))


def _divisor(spec: QuantSpec) -> float:
    """What the largest magnitude is divided by."""
    if not isinstance(spec.element, IntElement):
        return spec.element.largest
    codes = 2.0 ** (spec.bits - 1)
    return {"narrow": codes - 1, "half": codes - 0.5, "full": codes}[spec.range] if spec.signed else float(spec.qmax)


def _least(spec: QuantSpec) -> float:
    """The least magnitude of a scale."""
    return max(scaling_min(spec.scale), spec.scaling_min or 0.0)


def _axes(spec: QuantSpec, rank: int) -> tuple[list[int], bool]:
    """The axes to reduce over and whether to keep them; groups are an axis of their own by then."""
    if isinstance(spec.granularity, PerTensor):
        return list(range(rank)), True
    if isinstance(spec.granularity, PerChannel):
        kept = {axis % rank for axis in spec.granularity.axes}
        return [axis for axis in range(rank) if axis not in kept], True
    return [-1], not isinstance(spec.granularity, PerGroup)


def _signed_step(rewriter: Rewriter, at: fx.Node, x: fx.Node, spec: QuantSpec, axes: list[int], keep: bool) -> fx.Node:
    low = rewriter.call(at, aten.amin.default, x, axes, keep)
    high = rewriter.call(at, aten.amax.default, x, axes, keep)
    negative = rewriter.call(at, aten.ge.Tensor, rewriter.call(at, aten.neg.default, low), high)
    step = rewriter.call(at, aten.div.Tensor, rewriter.call(at, aten.where.self, negative, low, high), float(spec.qmin))
    one = rewriter.constant("one", torch.tensor(1.0))
    return rewriter.call(at, aten.where.self, rewriter.call(at, aten.eq.Scalar, step, 0), one, step)


def _asymmetric(
    rewriter: Rewriter, at: fx.Node, x: fx.Node, spec: QuantSpec, axes: list[int], keep: bool
) -> tuple[fx.Node, fx.Node]:
    low = rewriter.call(at, aten.clamp.default, rewriter.call(at, aten.amin.default, x, axes, keep), None, 0.0)
    high = rewriter.call(at, aten.clamp.default, rewriter.call(at, aten.amax.default, x, axes, keep), 0.0)
    width = rewriter.call(at, aten.sub.Tensor, high, low)
    step = rewriter.call(at, aten.div.Tensor, width, float(spec.qmax - spec.qmin))
    step = rewriter.call(at, aten.clamp.default, step, _least(spec))
    scale = rewriter.as_dtype(at, step, spec.scale_dtype)
    shift = rewriter.call(at, aten.div.Tensor, low, rewriter.as_dtype(at, scale, torch.float32))
    zero = rewriter.call(at, aten.rsub.Scalar, shift, float(spec.qmin))
    if spec.zero == "int":
        zero = rewriter.call(at, aten.round.default, zero)
    zero = rewriter.call(at, aten.clamp.default, zero, float(spec.qmin), float(spec.qmax))
    return scale, rewriter.as_dtype(at, zero, spec.zero_dtype)
