"""Capture: a model directory, a module, or an exported program → `Program`.

`qcompile.capture` is this package and, called, the function below: both `qcompile.capture(…)` and
`from qcompile.capture import capture` work, whichever is imported first.
"""

from __future__ import annotations

import sys
from os import PathLike
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.export import ExportedProgram

from qcompile.capture.module import Example, capture_exported, capture_module
from qcompile.capture.saved import MAIN, load_program
from qcompile.errors import CaptureError
from qcompile.ir.program import Program

__all__ = ["capture"]

Source = str | PathLike[str] | nn.Module | ExportedProgram


def capture(source: Source, example: Example | None = None, *, dtype: torch.dtype | str | None = None) -> Program:
    """Turn a model into a `Program`.

    `source` may be

    - a directory of transformers (config.json and safetensors), or a hub id ``org/name``: the graph is traced on fake
      tensors, the weights stay in their files and are read when touched;
    - a directory that `qcompile.capture.saved.save_program` or `CompiledModel.save` wrote;
    - a ``.pt2`` file of `torch.export.save`; refused where loading it would unpickle objects or run native code;
    - an `ExportedProgram`;
    - a `transformers.PreTrainedModel` in memory, or any `nn.Module` with `example` inputs.

    A causal LM takes int64 `input_ids` ``[batch, sequence]``, `attention_mask` ``[batch, past + sequence]`` and, where
    the model takes positions, `position_ids` ``[batch, sequence]``, with `past_key_values_{i}_key` and `…_value`
    ``[batch, heads, past, width]``; it returns `logits` ``[batch, sequence, vocabulary]`` and `present_{i}_key`,
    `present_{i}_value` ``[batch, heads, past + sequence, width]``. The cache always holds every token, also where the
    model attends to a window. A model whose state is not keys and values is captured without: `logits` only, and
    ``program.info["notes"]`` says why. Encoders return what their class returns. Experts are computed as gather and
    bmm.

    Args:
        example: inputs of an `nn.Module`: a tensor, a tuple, or a dict by argument name. Axes of size 2 or more stay
            dynamic unless the module's code fixes them.
        dtype: floating-point dtype of the program. None: as the checkpoint has it, but float32 for float16 and
            bfloat16, which CPUs run slowly or not at all. ``"auto"``: as the checkpoint has it. A dtype or its name:
            that; weights are cast as they are read. float64 also widens the float32 steps that models spell out
            (norms, rotary tables), so that exact rewrites agree to 1e-14. Modules in memory keep their dtype.

    Raises:
        CaptureError: the source is missing, incomplete, corrupt, a pickle, unknown to transformers or needs its own
            code, its weights do not fit its configuration, or torch.export refuses it; one line, with the way out.
    """
    from transformers import PreTrainedModel

    from qcompile.capture.pretrained import capture_model

    if isinstance(source, ExportedProgram):
        return capture_exported(source, "ExportedProgram")
    if isinstance(source, PreTrainedModel) and example is None:
        return capture_model(source, dtype)
    if isinstance(source, nn.Module):
        if example is None:
            raise CaptureError(f"{type(source).__name__} is traced on example inputs; give example=")
        return capture_module(source, example, dtype)
    if not isinstance(source, (str, PathLike)):
        raise CaptureError(f"cannot capture a {type(source).__name__}; give a path, a module or an exported program")
    return _capture_path(source, dtype)


def _capture_path(source: str | PathLike[str], dtype: torch.dtype | str | None) -> Program:
    from qcompile.capture.files import find_directory
    from qcompile.capture.pretrained import capture_directory
    from qcompile.capture.pt2 import load_pt2

    path = Path(source).expanduser()
    if path.suffix == ".pt2" and path.is_file():
        return capture_exported(load_pt2(path), str(source))
    if (path / MAIN).is_file():
        return load_program(path)
    return capture_directory(find_directory(path if path.exists() else str(source)), str(source), dtype)


class _Callable(ModuleType):
    """Python binds a package's name in its parent to the module once it is imported; so the module is callable."""

    def __call__(
        self, source: Source, example: Example | None = None, *, dtype: torch.dtype | str | None = None
    ) -> Program:
        return capture(source, example, dtype=dtype)


_Callable.__call__.__doc__ = capture.__doc__
sys.modules[__name__].__class__ = _Callable
