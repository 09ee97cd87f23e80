"""What onnx_qcdq cannot take, said before anything is done."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from functools import cache

import torch
from torch import fx
from torch._ops import OpOverload

from qcompile.backend_base import Obstacle
from qcompile.backends.onnx_qcdq import qparams
from qcompile.backends.onnx_qcdq.recognise import (
    CHOOSE,
    DEQUANTIZE,
    FLOAT8,
    QUANTIZE,
    float8,
    parse_spec,
    shape_of,
)
from qcompile.errors import LoweringError, SpecError
from qcompile.hadamard import HADAMARD
from qcompile.ir.program import Program
from qcompile.numerics.element import IntElement
from qcompile.numerics.granularity import PerBlock, PerGroup
from qcompile.numerics.scale_type import DoubleScale, E4M3Scale, E8M0Scale, MicroScale
from qcompile.numerics.spec import QuantSpec

_OURS = (CHOOSE, QUANTIZE, DEQUANTIZE)
_DTYPES = (torch.float32, torch.float16, torch.int64, torch.int32, torch.int8, torch.uint8, torch.bool)


def require_packages() -> None:
    """Raise LoweringError unless everything that writes ONNX is installed."""
    for module in ("onnx", "onnx_ir", "onnxscript"):
        if importlib.util.find_spec(module) is None:
            raise LoweringError(f"{module} is not installed; run: pip install onnx onnx-ir onnxscript onnxruntime")


def obstacles(program: Program) -> list[Obstacle]:
    """Every operator, dtype and spec of `program` that this target cannot take."""
    require_packages()
    found = [Obstacle(node.name, program.module_of(node), reason) for node, reason in _dtypes(program)]
    for node in program.nodes:
        reasons = _quantized(program, node) if node.target in _OURS else _operator(node)
        found += [Obstacle(node.name, program.module_of(node), reason) for reason in reasons]
    return found


def _dtypes(program: Program) -> Iterator[tuple[fx.Node, str]]:
    """Element types of weights and inputs that onnxruntime's CPU kernels do not compute with."""
    scales = {program.arg(n, name) for n in program.calls(QUANTIZE, DEQUANTIZE) for name in ("scale", "zero_point")}
    for node in program.placeholders:
        value = node.meta["val"]
        if not isinstance(value, torch.Tensor) or value.dtype in _DTYPES or node in scales:
            continue
        name = str(value.dtype).removeprefix("torch.")
        if node.name.startswith("past_key_values_"):
            yield node, f"a cache with scales in {name} cannot be given to onnxruntime; use scale=f32 or f16"
        else:
            yield node, f"onnxruntime computes no language model in {name}; capture the model with dtype=float32"


def _operator(node: fx.Node) -> Iterator[str]:
    if not isinstance(node.target, OpOverload) or _name(node.target) in _translatable() or node.target is HADAMARD:
        return
    if node.target.has_kernel_for_dispatch_key(torch._C.DispatchKey.CompositeImplicitAutograd):
        return  # taken apart into operators that the conversion looks at
    yield f"{node.target} has no ONNX form; rewrite it in a pass, or leave that part out"


@cache
def _translatable() -> frozenset[object]:
    """Names of the operators that torch's ONNX exporter translates or takes apart, overloads included."""
    import onnxscript.function_libs.torch_lib.ops  # noqa: F401  fills the registry
    from onnxscript.function_libs.torch_lib.registration import default_registry
    from torch.onnx._internal.exporter._torchlib import _torchlib_registry

    translated = {str(name) for name, _ in default_registry.items()}
    own = {_name(entry.fx_target) for entry in _torchlib_registry.get_torchlib_ops()}
    apart = {*torch.export.default_decompositions(), *torch._decomp.decomposition_table}
    return frozenset(translated | own | {_name(target) for target in apart})


def _name(target: object) -> str:
    """``aten::add.Tensor``; the default overload goes without its name."""
    if not isinstance(target, OpOverload):
        return str(target)
    return target._schema.name + ("" if target._overloadname == "default" else f".{target._overloadname}")


def _quantized(program: Program, node: fx.Node) -> Iterator[str]:
    try:
        spec = parse_spec(str(program.arg(node, "spec")))
    except SpecError as error:
        yield str(error)
        return
    operand = program.arg(node, "codes" if node.target is DEQUANTIZE else "x")
    if (unfit := _unfit(spec)) is not None:
        yield f"{spec}: {unfit}"
        return
    if float8(spec) is not None and _kept(program, node):
        yield f"{spec}: onnxruntime neither joins nor exchanges 8-bit floats, so none can be cached; use int8"
        return
    if program.is_weight(operand) and node.target is not DEQUANTIZE:
        if node.target is CHOOSE:
            key = program.key(operand)
            yield f"the weight {key!r} is not rounded yet ({spec}); run a pass that rounds weights, such as rtn"
        return
    if node.target is CHOOSE:
        if (reason := qparams.why_not(spec, len(shape_of(operand)))) is not None:
            yield reason
    elif not program.is_weight(operand) and _grouped_elsewhere(spec, len(shape_of(operand))):
        yield f"{spec}: groups of an activation lie along its last axis only; use token, or group= without axis="


def _unfit(spec: QuantSpec) -> str | None:
    """What DequantizeLinear has no form for, and the way out."""
    if not isinstance(spec.element, IntElement) and float8(spec) is None:
        known = f"int1 to int8, {', '.join(FLOAT8)}"
        return f"onnxruntime dequantizes no {spec.element}; use {known}, or another target"
    match spec.scale:
        case DoubleScale():
            return "DequantizeLinear takes no scales that are quantized themselves; drop double="
        case E8M0Scale() | MicroScale():
            return f"onnxruntime takes no {spec.scale} scales; use scale=pow2, or another target"
        case E4M3Scale():
            return f"onnxruntime takes no {spec.scale} scales; use scale=f16, or another target"
    if isinstance(spec.zero, DoubleScale):
        return "DequantizeLinear takes no zero-points that are quantized themselves; use zero=int"
    if spec.via is not None:
        return f"DequantizeLinear rounds nothing to {spec.via}; drop via="
    if isinstance(spec.element, IntElement) and spec.element.fraction:
        return f"DequantizeLinear reads no fixed-point codes; use int{spec.bits}, whose scale says the same"
    return None


def _kept(program: Program, node: fx.Node) -> bool:
    """Whether the codes that a call makes or takes are more than a step between quantize and dequantize."""
    if node.target is QUANTIZE:
        return any(user.target is not DEQUANTIZE for user in node.users)
    codes = program.arg(node, "codes") if node.target is DEQUANTIZE else None
    return codes is not None and not program.is_weight(codes) and codes.target is not QUANTIZE


def _grouped_elsewhere(spec: object, rank: int) -> bool:
    granularity = getattr(spec, "granularity", None)
    return isinstance(granularity, PerBlock) or (
        isinstance(granularity, PerGroup) and granularity.axis % rank != rank - 1
    )
