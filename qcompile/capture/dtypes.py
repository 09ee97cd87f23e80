"""Making a float64 program float64 throughout.

Models spell out float32 in places whatever their dtype is (norms, softmax, rotary tables), so that a model in float64
agrees with a transformed one only to about 1e-7. Widened, rewrites that are exact in real arithmetic agree to 1e-14.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.program import Program

aten = torch.ops.aten


def widen(program: Program) -> None:
    """Turn every float32 of a program (weights, casts, dtype arguments) into float64."""
    for node in program.weight_nodes:
        key = program.key(node)
        shape, dtype = program.weights.meta(key)
        if dtype is torch.float32:
            program.weights.edit(key, _double, dtype=torch.float64)
            node.meta["val"] = program.fake(shape, torch.float64)
    for node in program.nodes:
        node.args = _widened(node.args)
        node.kwargs = _widened(node.kwargs)
        program.infer(node)
    for node in program.calls(aten.to.dtype):
        source = node.args[0]
        if isinstance(source, fx.Node) and program.value(source).dtype == program.value(node).dtype:
            program.replace(node, source)
    program.verify()


def _double(tensor: Tensor) -> Tensor:
    return tensor.to(torch.float64)


def _widened(value: Any) -> Any:
    if value is torch.float32:
        return torch.float64
    if isinstance(value, (list, tuple)):
        return type(value)(_widened(v) for v in value)
    if isinstance(value, dict):
        return {k: _widened(v) for k, v in value.items()}
    return value
