"""Models of transformers → programs: from a directory with the weights left in their files, or from memory."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.capture.build import EXPERTS, build_fake
from qcompile.capture.checkpoint import NotLazy, bind, missing, resolve
from qcompile.capture.config import describe, model_class, parse_dtype, read_config, resolve_dtype
from qcompile.capture.decoder import Exported, experts_and_mode, export_decoder, export_headless
from qcompile.capture.dtypes import widen
from qcompile.capture.experts import without_loops
from qcompile.capture.files import one_line, read_shards
from qcompile.errors import CaptureError
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel


def capture_directory(directory: Path, source: str, dtype: torch.dtype | str | None) -> Program:
    """Capture the transformers model in `directory`; its weights stay in its safetensors files.

    Raises CaptureError; see `qcompile.capture`.
    """
    parse_dtype(dtype)
    config = read_config(directory)
    cls = model_class(config)
    tensors = read_shards(directory)
    resolved = resolve_dtype(dtype, config, tensors)
    mode = FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv())
    notes: list[str] = []
    try:
        model = _build(cls, config, resolved, mode)
        store = bind(model, resolve(model, tensors, mode), notes)
    except NotLazy as reason:
        model = _load(cls, directory, resolved)
        note = f"all weights were loaded into memory: {reason}"
        return _from_memory(model, describe(model.config, model, directory, source), resolved, [note])
    exported = _export(model, notes, mode)
    if lacking := missing(model, store, _read(exported.program)):
        raise CaptureError(
            f"the checkpoint in {directory} lacks weight {lacking[0]!r} ({len(lacking)} in all); fetch it again, or "
            "correct config.json"
        )
    return _finish(exported, store, describe(config, model, directory, source), resolved, notes)


def capture_model(model: PreTrainedModel, dtype: torch.dtype | str | None) -> Program:
    """Capture a model of transformers that is in memory; its tensors are shared, not copied.

    Raises CaptureError; see `qcompile.capture`.
    """
    asked = parse_dtype(dtype)
    if isinstance(asked, torch.dtype) and asked != model.dtype:
        raise CaptureError(f"the model is {model.dtype}, dtype={asked} is asked for; call model.to({asked}) first")
    source = getattr(model.config, "_name_or_path", "") or type(model).__name__
    directory = Path(source) if Path(source).is_dir() else None
    info = describe(model.config, model, directory, source)
    return _from_memory(model, info, asked if isinstance(asked, torch.dtype) else None, [])


def _from_memory(model: PreTrainedModel, info: dict[str, Any], dtype: torch.dtype | None, notes: list[str]) -> Program:
    with experts_and_mode(model, EXPERTS):
        exported = _export(model, notes, None)
    return _finish(exported, None, info, dtype, notes)


def _build(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode
) -> PreTrainedModel:
    try:
        return build_fake(cls, config, dtype, mode)
    except (ImportError, NotImplementedError) as error:
        raise CaptureError(f"{cls.__name__} cannot be built here: {one_line(error)}") from error
    except Exception as error:  # a constructor that computes with its parameters
        raise NotLazy(f"{cls.__name__} does not build on fake parameters ({one_line(error, 80)})") from error


def _load(cls: type[PreTrainedModel], directory: Path, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = cls.from_pretrained(
            directory, dtype=dtype, local_files_only=True, use_safetensors=True, output_loading_info=True
        )
    except Exception as error:  # whatever transformers raises for a directory it cannot load
        raise CaptureError(f"transformers cannot load {directory}: {one_line(error)}") from error
    for kind, says in (("missing_keys", "lacks"), ("mismatched_keys", "has with another shape")):
        if found := sorted(map(str, report[kind])):
            raise CaptureError(f"the checkpoint in {directory} {says} weight {found[0]} that config.json asks for")
    return model


def _export(model: PreTrainedModel, notes: list[str], mode: FakeTensorMode | None) -> Exported:
    """With the cache where the model generates and has one of keys and values, else without."""
    with without_loops(model):
        return _export_form(model, notes, mode)


def _export_form(model: PreTrainedModel, notes: list[str], mode: FakeTensorMode | None) -> Exported:
    if model.can_generate():
        try:
            return export_decoder(model, mode)
        except CaptureError as error:
            notes.append(f"captured without a KV cache: {error}")
    if "token_type_ids" in inspect.signature(model.forward).parameters:
        notes.append("token_type_ids are those the model takes when none are given")
    try:
        return export_headless(model, mode)
    except CaptureError as error:
        raise CaptureError(f"{type(model).__name__} cannot be captured: {error}") from error


def _read(exported: ExportedProgram) -> set[str]:
    """Names of the parameters that the graph reads and that have no value."""
    used = {node.name for node in exported.graph.find_nodes(op="placeholder") if node.users}
    return {
        str(spec.target).removeprefix("model.")
        for spec in exported.graph_signature.input_specs
        if spec.kind is InputKind.PARAMETER
        and spec.arg.name in used
        and isinstance(exported.state_dict[str(spec.target)], FakeTensor)
    }


def _finish(
    exported: Exported, store: WeightStore | None, info: dict[str, Any], dtype: torch.dtype | None, notes: list[str]
) -> Program:
    program = from_exported(exported.program, store, "model.", exported.inputs, exported.outputs)
    if store is not None:
        for key in set(store) - {program.key(node) for node in program.weight_nodes}:
            del store[key]
    if dtype is torch.float64:
        widen(program)
    program.info = info | {"notes": notes}
    return program
