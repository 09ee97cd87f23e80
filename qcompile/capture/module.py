"""Any `nn.Module`, with example inputs, or an exported program."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.utils import _pytree as pytree

from qcompile.capture.config import parse_dtype
from qcompile.capture.dtypes import widen
from qcompile.capture.files import one_line
from qcompile.errors import CaptureError
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program
from qcompile.ir.state import present_name

Example = tuple[Any, ...] | Mapping[str, Any] | Tensor


def capture_module(module: nn.Module, example: Example, dtype: torch.dtype | str | None) -> Program:
    """Export `module` on `example`; every axis that the module's code does not fix stays dynamic.

    Raises CaptureError; see `qcompile.capture`.
    """
    asked = parse_dtype(dtype)
    args, kwargs = _arguments(example)
    notes = [
        f"input {pytree.keystr(path)} axis {axis} is fixed at {size}: give an example of 2 or more to keep it dynamic"
        for path, value in pytree.tree_flatten_with_path((args, kwargs))[0]
        if isinstance(value, Tensor)
        for axis, size in enumerate(value.shape)
        if size < 2
    ]
    training = {child: child.training for child in module.modules()}
    module.eval()
    try:
        with torch.no_grad():
            exported = torch.export.export(
                module, args, kwargs, dynamic_shapes=_dynamic(module, args, kwargs), strict=False
            )
    except Exception as error:  # torch.export lets through whatever the module's code raises
        raise CaptureError(
            f"torch.export refuses {type(module).__name__} ({type(error).__name__}: {one_line(error)})"
        ) from error
    finally:
        for child, mode in training.items():
            child.training = mode
    program = capture_exported(exported, type(module).__name__)
    if isinstance(asked, torch.dtype) and any(p.dtype != asked for p in module.parameters()):
        raise CaptureError(f"the module is not all {asked}; call module.to({asked}) first")
    if asked is torch.float64:
        widen(program)
    program.info["notes"] += notes
    return program


def capture_exported(exported: ExportedProgram, source: str) -> Program:
    """Take an exported program; its tensors are shared, not copied."""
    program = from_exported(exported)
    past = [node.name for node in program.inputs if node.name.startswith("past_key_values_")]
    if past and len(program.output_names) == 1 + len(past):  # a decoder that was captured here: torch keeps no names
        program.output_names = ("logits", *(present_name(name) for name in past))
    program.info = {"model_type": None, "architecture": source, "source": source, "tokenizer": None, "notes": []}
    return program


def _arguments(example: Example) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(example, Tensor):
        return (example,), {}
    if isinstance(example, Mapping):
        return (), dict(example)
    return tuple(example), {}


def _dynamic(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`Dim.AUTO` for every axis of every tensor, in the structure of the call."""

    def axes(value: Any) -> Any:
        return dict.fromkeys(range(value.ndim), Dim.AUTO) if isinstance(value, Tensor) else None

    if kwargs:
        return {name: pytree.tree_map(axes, value) for name, value in kwargs.items()}
    return tuple(pytree.tree_map(axes, value) for value in args)
