"""Lowering: obstacles, then the program's rewriting, its conversion, and files written tensor by tensor."""

from __future__ import annotations

import math
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

from qcompile.backend_base import LoweredFiles, StoredTensor, refuse
from qcompile.backends.onnx_qcdq.obstacles import obstacles, require_packages
from qcompile.ir.program import Program

if TYPE_CHECKING:
    import onnx_ir as ir

    from qcompile.backends.onnx_qcdq.backend import OnnxQcdqBackend

MODEL, DATA = "model.onnx", "model.onnx.data"
FLOAT_COPY = " (float copy)"
"""Ends the name of a weight that something reads as it was, beside its codes."""
_PARTS = (".codes", ".scale", ".zero_point", ".sums")


def lower(backend: OnnxQcdqBackend, program: Program, directory: Path) -> LoweredFiles:
    """See `OnnxQcdqBackend.lower`."""
    require_packages()
    refuse(backend, obstacles(program))

    import onnx
    import onnx_ir as ir

    from qcompile.backends.onnx_qcdq.convert import convert
    from qcompile.backends.onnx_qcdq.genai import write_genai_config
    from qcompile.backends.onnx_qcdq.names import rename
    from qcompile.backends.onnx_qcdq.prelower import prelower

    prelowered = prelower(program, backend.style)
    model = convert(prelowered, backend.opset)
    tensors = _stored_tensors(model, program)
    rename(model, prelowered.program, prelowered.original)
    _describe(model, program)
    ir.save(model, directory / MODEL, external_data=DATA, size_threshold_bytes=backend.external_data_threshold)
    onnx.checker.check_model(str(directory / MODEL))
    count, integer = prelowered.products, prelowered.integer_products
    notes = [f"{count} products with quantized weights, {integer} of them in a form that runs on integers"]
    if (note := write_genai_config(program, directory)) is not None:
        notes.append(note)
    packages = ("onnx", "onnxruntime", "onnxscript", "onnx-ir")
    return LoweredFiles(MODEL, tensors, tuple(notes), {name: version(name) for name in packages})


def _describe(model: ir.Model, program: Program) -> None:
    import qcompile
    from qcompile.backends.onnx_qcdq.names import MAX_POSITIONS

    model.producer_name, model.producer_version = "qcompile", qcompile.__version__
    model.graph.name = "main"
    model.graph.metadata_props.clear()
    if (positions := program.info.get("max_positions")) is not None:
        model.metadata_props[MAX_POSITIONS] = str(positions)


def _stored_tensors(model: ir.Model, program: Program) -> tuple[StoredTensor, ...]:
    """Every weight of the program with the bytes that are written for it, copies in another layout included."""
    from qcompile.backends.onnx_qcdq.recognise import activation_parameters
    from qcompile.backends.onnx_qcdq.rewriting import base_key

    activation = {program.key(part) for part in activation_parameters(program)}
    kinds: dict[str, tuple[str, int]] = {}
    sizes: dict[str, int] = {}
    for key, value in model.graph.initializers.items():
        base, tensor = base_key(key), value.const_value
        if tensor is None or base in activation:
            continue
        name = _weight_name(base, program)
        sizes[name] = sizes.get(name, 0) + tensor.nbytes
        if base in program.weights and (base.endswith(".codes") or not base.endswith(_PARTS)):
            kinds[name] = (_container(tensor.dtype), math.prod(program.weights.meta(base)[0]))
    return tuple(StoredTensor(name, *kind, sizes[name]) for name, kind in kinds.items())


def _container(dtype: ir.DataType) -> str:
    """``float32`` for what onnx calls FLOAT; its other names in lower case."""
    return {"FLOAT": "float32", "DOUBLE": "float64"}.get(dtype.name, dtype.name.lower())


def _weight_name(key: str, program: Program) -> str:
    """The weight that codes, scales and zero-points belong to; a weight that is stored as codes too says so."""
    for part in _PARTS:
        if key.endswith(part) and f"{key.removesuffix(part)}.codes" in program.weights:
            return key.removesuffix(part)
    return f"{key}{FLOAT_COPY}" if f"{key}.codes" in program.weights else key
