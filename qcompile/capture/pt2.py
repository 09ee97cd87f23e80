"""`.pt2` files of `torch.export.save`, opened only where opening them runs no code.

`torch.export.load` unpickles objects, loads native libraries and evaluates size expressions that the archive brings. A
plain program needs none of that, so an archive that asks for it is refused before torch sees it.
"""

from __future__ import annotations

import ast
import io
import json
import pickle
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from qcompile.capture.files import one_line
from qcompile.errors import CaptureError

_ARITHMETIC = (ast.Expression, ast.BinOp, ast.UnaryOp, ast.Compare, ast.Name)


def load_pt2(path: Path) -> ExportedProgram:
    """Load an exported program. Raises CaptureError for an archive that is broken or could run code."""
    import qcompile.ops  # noqa: F401  registers the operators that the program may name

    try:
        with zipfile.ZipFile(path) as archive:
            _check(path, archive)
    except (zipfile.BadZipFile, OSError, ValueError, KeyError) as error:
        raise CaptureError(
            f"{path} is no intact archive of torch.export.save ({one_line(error)}); export and save it again"
        ) from error
    try:
        loaded: ExportedProgram = torch.export.load(path)
    except Exception as error:  # whatever the deserialiser meets
        raise CaptureError(
            f"torch {torch.__version__} cannot load {path} ({one_line(error)}); save it with this version"
        ) from error
    return loaded


def _check(path: Path, archive: zipfile.ZipFile) -> None:
    names = {name.partition("/")[2]: name for name in archive.namelist()}
    if "archive_format" not in names:
        raise CaptureError(f"{path} is not of the format of torch {torch.__version__}; export and save it again")
    for name, full in names.items():
        if name.startswith("data/aotinductor/"):
            raise CaptureError(f"{path} holds compiled native code, which is not run; save the exported program alone")
        if name.startswith("data/sample_inputs/"):
            _check_samples(path, archive.read(full))
        elif name.endswith("_config.json"):
            _check_payloads(path, json.loads(archive.read(full)))
        elif name.startswith(("data/weights/", "data/constants/")) and name.endswith(".pt"):
            raise CaptureError(f"{path} keeps tensors as pickles, which are never opened; save it with a newer torch")
        elif name.startswith("models/"):
            _check_model(path, json.loads(archive.read(full)))


def _check_payloads(path: Path, config: dict[str, Any]) -> None:
    for key, payload in config.get("config", {}).items():
        if payload.get("use_pickle") or not payload.get("tensor_meta"):
            raise CaptureError(
                f"{path} keeps {key!r} as a pickle, which is never opened; export it without that object"
            )


def _check_samples(path: Path, data: bytes) -> None:
    """Sample inputs are pickled; torch falls back to a full unpickling where the safe one fails: refuse those."""
    try:
        if data:
            torch.load(io.BytesIO(data), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError) as error:
        raise CaptureError(
            f"{path} has sample inputs that only a full unpickling can read; drop them (program.example_inputs = None)"
        ) from error


def _check_model(path: Path, value: Any) -> None:
    """Size expressions are evaluated as Python: let through arithmetic on names only; no enum imports."""
    if isinstance(value, list):
        for item in value:
            _check_model(path, item)
    elif isinstance(value, dict):
        for key, item in value.items():
            if key == "expr_str" and isinstance(item, str):
                _check_size(path, item)
            elif key in ("in_spec", "out_spec") and isinstance(item, str) and "__enum__" in item:
                raise CaptureError(
                    f"{path} passes an enum as argument, which would import its module; pass plain values"
                )
            else:
                _check_model(path, item)


def _check_size(path: Path, text: str) -> None:
    try:
        plain = _is_plain(ast.parse(text, mode="eval"))
    except (SyntaxError, RecursionError):
        plain = False
    if not plain:
        raise CaptureError(
            f"{path} has {text[:60]!r} for a size, which is no arithmetic on sizes; export and save it again"
        )


def _is_plain(node: ast.AST) -> bool:
    """Numbers, names, operators, ``Symbol('s0', integer=True)``, calls of sympy's classes (they are capitalised)."""
    if isinstance(node, ast.Constant):
        return isinstance(node.value, (int, float))
    if isinstance(node, ast.Call):
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        arguments = list(node.args)
        if name == "Symbol" and arguments and isinstance(symbol := arguments.pop(0), ast.Constant):
            return str(symbol.value).isidentifier() and all(_is_plain(k.value) for k in node.keywords)
        known = name[:1].isupper() or name in ("floor", "ceiling")
        return known and all(map(_is_plain, arguments)) and all(_is_plain(k.value) for k in node.keywords)
    if isinstance(node, (ast.operator, ast.unaryop, ast.cmpop, ast.expr_context)):
        return True
    return isinstance(node, _ARITHMETIC) and all(map(_is_plain, ast.iter_child_nodes(node)))
