"""What torch_mlir cannot take, said before anything is done."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from functools import cache

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.backend_base import Obstacle
from qcompile.backends.onnx_qcdq.qparams import why_not
from qcompile.backends.onnx_qcdq.recognise import CHOOSE, DEQUANTIZE, QUANTIZE, parse_spec, shape_of
from qcompile.backends.torch_mlir import toolchain, types
from qcompile.backends.torch_mlir.emit import operator_name
from qcompile.errors import LoweringError, SpecError
from qcompile.hadamard import HADAMARD
from qcompile.ir.program import Program
from qcompile.numerics.element import IntElement
from qcompile.numerics.scale_type import FloatScale, Pow2Scale
from qcompile.numerics.spec import QuantSpec

_OURS = (CHOOSE, QUANTIZE, DEQUANTIZE)
_FLOAT32_ONLY = (torch.float16, torch.bfloat16, torch.float64)


def obstacles(program: Program) -> list[Obstacle]:
    """Every operator, dtype and spec of `program` that this target cannot take."""
    found = [Obstacle(node.name, program.module_of(node), reason) for node, reason in _dtypes(program)]
    for node in program.nodes:
        reasons = _quantized(program, node) if node.target in _OURS else _operator(node)
        found += [Obstacle(node.name, program.module_of(node), reason) for reason in reasons]
    return found


def _dtypes(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Element types of weights and inputs that are not taken; parameters of codes are decoded."""
    parameters = {
        argument
        for node in program.calls(QUANTIZE, DEQUANTIZE)
        for argument in (*(program.arg(node, n) for n in ("scale", "zero_point")), *(program.arg(node, "outer") or ()))
    }
    for node in program.placeholders:
        value = node.meta["val"]
        if not isinstance(value, Tensor) or node in parameters:
            continue
        if value.dtype in _FLOAT32_ONLY or not types.taken(value.dtype):
            name = str(value.dtype).removeprefix("torch.")
            yield node, f"modules compute in float32, not in {name}; capture the model with dtype=float32"
    for node in program.nodes:
        value = node.meta["val"]
        if isinstance(value, Tensor) and not types.taken(value.dtype):
            yield node, f"{node.target} gives {value.dtype}, which modules do not compute with; leave that part out"


def _operator(node: fx.Node) -> Iterator[str]:
    if node.target in (operator.getitem, HADAMARD):
        return
    try:
        name = operator_name(node.target)
    except LoweringError as error:
        yield str(error)
        return
    if isinstance(node.target, OpOverload) and not _known(name):
        yield f"{node.target} is not in IREE's torch dialect; rewrite it in a pass, or leave that part out"


@cache
def _known(name: str) -> bool:
    """Whether the compiler knows an operator; where it is not installed, it is asked when it is."""
    return toolchain.missing() is not None or toolchain.known_operator(name)


def _quantized(program: Program, node: fx.Node) -> Iterator[str]:
    try:
        spec = parse_spec(str(program.arg(node, "spec")))
    except SpecError as error:
        yield str(error)
        return
    operand = program.arg(node, "codes" if node.target is DEQUANTIZE else "x")
    if program.is_weight(operand):
        if node.target is CHOOSE:
            key = program.key(operand)
            yield f"the weight {key!r} is not rounded yet ({spec}); run a pass that rounds weights, such as rtn"
        elif spec.via is not None:
            yield f"{spec}: weights are not rounded to {spec.via} as they are read; drop via="
        return
    if (reason := _activation(spec)) is not None:
        yield f"{spec}: {reason}"
    elif node.target is CHOOSE and (reason := why_not(spec, len(shape_of(operand)))) is not None:
        yield reason.replace("ONNX form", "form here")


def _activation(spec: QuantSpec) -> str | None:
    """Why values computed at run time cannot be quantized so, and the way out."""
    if not isinstance(spec.element, IntElement) or spec.element.fraction:
        return f"activations are quantized to int1 to int8 here, not to {spec.element}; use int8"
    if not isinstance(spec.scale, FloatScale | Pow2Scale):
        return f"activations take no {spec.scale} scales here; use scale=f32"
    return "activations are rounded once here; drop via=" if spec.via is not None else None
