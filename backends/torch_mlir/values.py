"""A quantized weight in the layout of `ops`: codes ``[…, K]``, K the summed axis, scales ``[…, groups]``.

What a format has beside integers and float scales becomes a table: the values of its codes (small floats, codebooks),
or the steps that its scale bytes stand for (E8M0, E4M3 with one global scale). Scales that are quantized in rows of
their own, and micro-exponents, are decoded to float32. All exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.recognise import QuantizedWeight, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.torch_mlir.weights import Packing, set_container
from qcompile.numerics.element import IntElement
from qcompile.numerics.parameters import QParams
from qcompile.numerics.quantize import decoded
from qcompile.numerics.scale_type import E4M3Scale, E8M0Scale, FloatScale, Pow2Scale
from qcompile.numerics.scaling import to_steps
from qcompile.numerics.spec import QuantSpec

TRANSPOSED = "@t"
"""Ends the key of a weight that lies the other way round than in the program."""


@dataclass(frozen=True)
class Values:
    """The operands of `ops` that a quantized weight becomes."""

    codes: fx.Node
    scale: fx.Node
    zero: fx.Node | None
    table: fx.Node | None
    steps: fx.Node | None

    @property
    def arguments(self) -> tuple[fx.Node | None, ...]:
        return self.codes, self.scale, self.zero, self.table, self.steps

    @property
    def groups(self) -> int:
        """Scales along the summed axis."""
        return int(shape_of(self.scale)[-1])


def values_of(rewriter: Rewriter, weight: QuantizedWeight, packing: Packing, transposed: bool = False) -> Values:
    """The weight's operands, its last axis the one that is summed over; `transposed` where a matrix lies as [K, N]."""
    spec, program = weight.spec, rewriter.program
    outer = [n for n in program.arg(weight.node, "outer") or () if n is not None]
    shape = weight.shape[::-1] if transposed else weight.shape
    codes = _codes(rewriter, weight, shape, transposed)
    lay = partial(_laid_out, shape=shape, transposed=transposed)
    scale_node, steps = _scale(rewriter, weight, outer, lay, shape, transposed)
    zero = None
    if weight.zero is not None:
        zero = _zero(rewriter, weight, outer, lay, shape, transposed)
    set_container(codes, int(shape_of(scale_node)[-1]), spec.bits, packing)
    return Values(codes, scale_node, zero, _table(rewriter, spec), steps)


def stores_float_scales(spec: QuantSpec) -> bool:
    """Whether scales are stored as the numbers they are."""
    return isinstance(spec.scale, FloatScale | Pow2Scale) and spec.when != "no_scale"


def _codes(rewriter: Rewriter, weight: QuantizedWeight, shape: tuple[int, ...], transposed: bool) -> fx.Node:
    if not transposed:
        return weight.codes
    key = rewriter.program.key(weight.codes)

    def turned(codes: Tensor) -> Tensor:
        return codes.T.contiguous()

    return rewriter.derive(f"{key}{TRANSPOSED}", (key,), turned, shape, weight.codes.meta["val"].dtype)


def _laid_out(parameter: Tensor, *, shape: tuple[int, ...], transposed: bool) -> Tensor:
    """A scale or zero-point as [rows …, groups]: repeated along every axis but the last."""
    laid = parameter.T if transposed else parameter
    for axis, size in enumerate(shape[:-1]):
        if laid.shape[axis] != size:
            laid = laid.repeat_interleave(size // laid.shape[axis], dim=axis)
    return laid.contiguous()


def _laid_shape(weight: QuantizedWeight, shape: tuple[int, ...], transposed: bool) -> tuple[int, ...]:
    scale = shape_of(weight.scale)
    return (*shape[:-1], int((scale[::-1] if transposed else scale)[-1]))


def _scale(
    rewriter: Rewriter,
    weight: QuantizedWeight,
    outer: list[fx.Node],
    lay: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    transposed: bool,
) -> tuple[fx.Node, fx.Node | None]:
    """The scale, and the table of what its bytes stand for where it is no number."""
    program, spec = rewriter.program, weight.spec
    key, target = program.key(weight.scale), _laid_shape(weight, shape, transposed)
    dtype = weight.scale.meta["val"].dtype
    if stores_float_scales(spec):
        if target == shape_of(weight.scale) and not transposed:
            return weight.scale, None
        return rewriter.derive(f"{key}@rows", (key,), lay, target, dtype), None
    keys = (key, *(program.key(n) for n in outer))
    single = all(shape_of(n).count(1) == len(shape_of(n)) for n in outer)
    if isinstance(spec.scale, E8M0Scale | E4M3Scale) and single and spec.when != "no_scale":

        def as_bytes(scale: Tensor) -> Tensor:
            return lay(scale.view(torch.uint8))

        def table(scale: Tensor, *rest: Tensor) -> Tensor:
            every = torch.arange(256, dtype=torch.uint8).view(scale.dtype).view(256, *[1] * (scale.dim() - 1))
            return to_steps(every, spec, tuple(rest)).float().reshape(256)

        steps = rewriter.derive(f"{key}@steps", keys, table, (256,), torch.float32)
        return rewriter.derive(f"{key}@bytes", (key,), as_bytes, target, torch.uint8), steps

    def step(scale: Tensor, *rest: Tensor) -> Tensor:
        if spec.when == "no_scale":
            return lay(torch.ones(scale.shape))
        return lay(to_steps(scale, spec, tuple(rest)).float())

    return rewriter.derive(f"{key}@float", keys, step, target, torch.float32), None


def _zero(
    rewriter: Rewriter,
    weight: QuantizedWeight,
    outer: list[fx.Node],
    lay: Callable[[Tensor], Tensor],
    shape: tuple[int, ...],
    transposed: bool,
) -> fx.Node:
    program, spec = rewriter.program, weight.spec
    assert weight.zero is not None
    key, target = program.key(weight.zero), _laid_shape(weight, shape, transposed)
    if spec.zero in ("int", "float"):
        if target == shape_of(weight.zero) and not transposed:
            return weight.zero
        return rewriter.derive(f"{key}@rows", (key,), lay, target, weight.zero.meta["val"].dtype)

    def plain(zero: Tensor, scale: Tensor, *rest: Tensor) -> Tensor:
        found = decoded(QParams(scale, zero, tuple(rest)), spec, torch.Size(weight.shape), torch.float32)[1]
        assert found is not None
        return lay(found.float())

    keys = (key, program.key(weight.scale), *(program.key(n) for n in outer))
    return rewriter.derive(f"{key}@float", keys, plain, target, torch.float32)


def _table(rewriter: Rewriter, spec: QuantSpec) -> fx.Node | None:
    """What each code is worth, where it is not worth itself."""
    element = spec.element
    if isinstance(element, IntElement):
        return None

    def make() -> fx.Node:
        codes = torch.arange(1 << spec.bits, dtype=torch.uint8)
        return rewriter.constant(f"{element}.values", element.decode(codes).float())

    return rewriter.shared((str(element), "values"), make)
