"""Printing a program as Python text that parses back (grammar: docs/ir.md)."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._ops import OpOverload

from qcompile.errors import VerifyError
from qcompile.ir.program import Program
from qcompile.ir.types import type_of

_PYTHON_MODULES = {"_operator": "operator", "math": "math"}


def print_program(program: Program) -> str:
    """The whole program: a signature, one call a line, a return of named outputs."""
    inputs = [f"{n.name}: {program.type_of(n)}" for n in program.inputs]
    weights = [_weight(program, n) for n in program.weight_nodes]
    parameters = [*inputs, "*", *weights] if weights else inputs
    one_line = f"def main({', '.join(parameters)}):"
    head = one_line if len(one_line) <= 120 else "def main(\n    " + ",\n    ".join(parameters) + ",\n):"
    body = [_line(program, n) for n in program.nodes]
    returned = ", ".join(f"{literal(name)}: {literal(value)}" for name, value in program.outputs.items())
    return "\n".join([head, *body, f"    return {{{returned}}}"])


def target_name(target: Callable[..., Any] | str) -> str:
    """How a call's target is spelled: ``aten.linear.default``, ``operator.add``, ``torch.sym_max``."""
    if isinstance(target, OpOverload):
        return str(target)
    module, name = getattr(target, "__module__", ""), getattr(target, "__name__", str(target))
    if module in _PYTHON_MODULES:
        return f"{_PYTHON_MODULES[module]}.{name}"
    if module == "torch" and name.startswith("sym_"):
        return f"torch.{name}"
    raise VerifyError(f"{target} is not an operator of the IR; see docs/ir.md#operators")


def literal(value: Any) -> str:
    """An argument as the IR spells it."""
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (list, tuple)):
        inner = ", ".join(map(literal, value))
        return f"[{inner}]" if isinstance(value, list) else f"({inner}{',' if len(value) == 1 else ''})"
    if isinstance(value, float) and not math.isfinite(value):
        return f'float("{value}")'
    if isinstance(value, torch.device):
        return f'torch.device("{value}")'
    if isinstance(value, slice):
        return f"slice({literal(value.start)}, {literal(value.stop)}, {literal(value.step)})"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False)  # a JSON string is a Python one
    if value is None or isinstance(value, (bool, int, float, torch.dtype, torch.layout, torch.memory_format)):
        return str(value)
    raise VerifyError(f"argument {value!r} of type {type(value).__name__} has no spelling in the IR")


def _weight(program: Program, node: fx.Node) -> str:
    text = f"{node.name}: {type_of(node.meta['val'], program.symbols)}"
    key = program.key(node)
    return text if key == node.name else f"{text} = {literal(key)}"


def _line(program: Program, node: fx.Node) -> str:
    args = [literal(a) for a in node.args] + [f"{k}={literal(v)}" for k, v in node.kwargs.items()]
    line = f"    {node.name}: {program.type_of(node)} = {target_name(node.target)}({', '.join(args)})"
    module = program.module_of(node)
    return f"{line}  # {module}" if module else line
