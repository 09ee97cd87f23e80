"""From a prelowered program to an ONNX model in memory whose weights are not read yet."""

from __future__ import annotations

import logging
import operator
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common
import onnxscript.optimizer
import onnxscript.rewriter
import torch
from onnx_ir.tensor_adapters import from_torch_dtype
from torch import fx

from qcompile.backends.onnx_qcdq.gathers import PAIRED
from qcompile.backends.onnx_qcdq.pack import LAYOUT, WEIGHT, container, lazy
from qcompile.backends.onnx_qcdq.prelower import Prelowered
from qcompile.backends.onnx_qcdq.products import TRANSPOSED
from qcompile.backends.onnx_qcdq.rewriting import base_key
from qcompile.backends.onnx_qcdq.translate import translation_table
from qcompile.errors import LoweringError
from qcompile.ir.program import Program

_FOLD_UP_TO = 1024
"""Elements of a constant that may be folded: shapes, scalars and masks, never a weight worth its bytes."""


def convert(prelowered: Prelowered, opset: int) -> ir.Model:
    """An ONNX model at `opset`; initializers read their weight when they are written.

    Raises LoweringError naming the node that has no ONNX form.
    """
    flat = prelowered.program.clone()
    keys = {node.name: flat.key(node) for node in flat.weight_nodes}
    for node in flat.weight_nodes:
        # A dotted key is a path of attributes to the exporter, and "w" beside "w.codes" would be two things at one.
        node.meta["weight"] = node.name
    _copy_parts(flat)
    exported = flat.to_exported(fake=True)
    try:
        with _quiet():
            converted = torch.onnx.export(
                exported,
                (),
                dynamo=True,
                opset_version=opset,
                custom_translation_table=translation_table(opset),
                optimize=False,
                verbose=False,
            )
    except torch.onnx.errors.OnnxExporterError as error:
        raise LoweringError(f"no ONNX form at opset {opset}: {_innermost(error)}") from error
    assert converted is not None
    model = converted.model
    _bind(model, prelowered, keys, opset)
    _simplify(model)
    return model


def _copy_parts(program: Program) -> None:
    """Return a copy of a part of an operator's result: torch.export loses the name of the part itself."""
    output = program.output_node
    returned = [
        program.call(torch.ops.aten.clone.default, (value,), before=output)
        if isinstance(value, fx.Node) and value.target is operator.getitem
        else value
        for value in program.outputs.values()
    ]
    output.args = (tuple(returned),)


def _innermost(error: BaseException) -> str:
    """The last line that the exporter's chain of errors ends in, with the node it speaks of."""
    lines = [str(error).strip().splitlines()[0]] if str(error).strip() else []
    cause: BaseException | None = error
    while cause is not None:
        if text := str(cause).strip():
            lines.append(text.splitlines()[0])
        cause = cause.__cause__
    node = next((line for line in lines if "node %" in line), "")
    return " ".join(dict.fromkeys([node, lines[-1]])).strip()


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporter's remarks on packages that are not installed and on its own deprecations."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _bind(model: ir.Model, prelowered: Prelowered, keys: Mapping[str, str], opset: int) -> None:
    """Give every initializer the weight that it stands for, under its key, in the type it is stored as."""
    program = prelowered.program
    for name, key in keys.items():
        value = model.graph.initializers.pop(name, None)
        if value is None:
            continue  # nothing reads it any more
        value.name = key
        model.graph.initializers[key] = value
        shape, dtype = program.weights.meta(key)
        stored = from_torch_dtype(dtype)
        if key in prelowered.bits:
            stored = container(prelowered.bits[key], dtype == torch.int8, opset)
        value.const_value = lazy(key, _reader(program, key), stored, shape)
        value.type = ir.TensorType(stored)
        if base_key(key).endswith(".codes"):
            value.metadata_props[WEIGHT] = base_key(key).removesuffix(".codes")
            value.metadata_props[LAYOUT] = _layout(key, prelowered.signed[base_key(key)])


def _reader(program: Program, key: str) -> Any:
    return lambda: program.weights[key]


def _layout(key: str, signed: bool) -> str:
    if key.endswith(TRANSPOSED):
        return "transposed"
    if key.endswith(PAIRED):
        return "pairs signed" if signed else "pairs unsigned"
    return "same"


def _keep(node: ir.Node) -> bool | None:
    """Never fold what quantizes or reads a weight: it would be read now, and written as something else."""
    weights = any(value is not None and isinstance(value.const_value, ir.LazyTensor) for value in node.inputs)
    return False if weights or node.op_type in ("QuantizeLinear", "DequantizeLinear") else None


def _simplify(model: ir.Model) -> None:
    """What `torch.onnx.export(optimize=True)` does, but for merging equal initializers.

    onnxruntime runs a QuantizeLinear with several readers in floating point; those that read one tensor are kept apart
    by scales of their own, which must not become one.
    """
    common.InlinePass()(model)
    _fold(model)
    onnxscript.rewriter.rewrite(model)
    _fold(model)
    for step in (
        common.RemoveUnusedNodesPass(),
        common.LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        common.CommonSubexpressionEliminationPass(),
        common.RemoveUnusedNodesPass(),
        common.RemoveUnusedOpsetsPass(),
        common.OutputFixPass(),
    ):
        step(model)


def _fold(model: ir.Model) -> None:
    onnxscript.optimizer.fold_constants_ir(
        model, input_size_limit=_FOLD_UP_TO, output_size_limit=_FOLD_UP_TO, should_fold=_keep
    )
