"""Experts that are gathered for each token become one product of packed experts.

    squeeze(bmm(index(dequantize(W), [expert]), unsqueeze(x, -1)), -1)   ⟶   expert_linear(x, expert, W)

W [E, N, K]; nothing is gathered: each expert's packed bytes are read once for all of its tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.recognise import QuantizedWeight, match_weight, same, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.matching import FLOATS, Left, outer_of, weight_format, weight_name
from qcompile.backends.triton.ops.experts import EXPERT_LINEAR
from qcompile.backends.triton.storing import PackedWeight, value_table
from qcompile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Gathered:
    """`result` is each row of x through the weight of its expert."""

    result: fx.Node
    x: fx.Node
    expert: fx.Node
    weight: QuantizedWeight


def lower_experts(rewriter: Rewriter, index: list[PackedWeight]) -> tuple[int, list[Left]]:
    """How many products of experts were replaced, and which were not and why."""
    count, left = 0, []
    for node in rewriter.program.calls(aten.bmm.default):
        found = _match(rewriter.program, node)
        if found is None:
            continue
        form = _format(rewriter.program, found)
        if isinstance(form, str):
            left.append(Left(node, weight_name(rewriter.program, found.weight), form))
            continue
        _replace(rewriter, found, form, index)
        count += 1
    return count, left


def _match(program: Program, node: fx.Node) -> Gathered | None:
    picked, column = program.arg(node, "self"), program.arg(node, "mat2")
    if picked.target is not aten.index.Tensor or column.target is not aten.unsqueeze.default:
        return None
    weight, indices = match_weight(program, picked.args[0]), picked.args[1]
    reader = next(iter(node.users), None)
    squeezed = (aten.squeeze.dim, aten.squeeze.dims)
    if weight is None or len(weight.shape) != 3 or len(indices) != 1 or len(node.users) != 1 or reader is None:
        return None
    x, expert = column.args[0], indices[0]
    last = program.arg(column, "dim") in (-1, 2) and reader.target in squeezed and same(shape_of(node)[-1], 1)
    if not last or reader.args[1] not in (-1, 2, [-1], [2]) or len(shape_of(x)) != 2 or len(shape_of(expert)) != 1:
        return None
    return Gathered(reader, x, expert, weight)


def _format(program: Program, found: Gathered) -> WeightFormat | str:
    if found.x.meta["val"].dtype not in FLOATS:
        return f"kernels compute in float32, float16 and bfloat16, not in {found.x.meta['val'].dtype}"
    if not all(program.is_weight(outer) for outer in outer_of(program, found.weight)):
        return "an outer parameter of the weight is computed as it runs"
    scale = shape_of(found.weight.scale)
    if scale[0] != found.weight.shape[0]:
        return "one scale is shared by all experts"
    return weight_format(found.weight, out_first=True)


def _replace(rewriter: Rewriter, found: Gathered, form: WeightFormat, index: list[PackedWeight]) -> None:
    program, weight = rewriter.program, found.weight
    name, (count, outputs, _) = weight_name(program, weight), (int(size) for size in weight.shape)
    codes = (program.key(weight.codes),)
    planes = [
        rewriter.derive(f"{name}.plane{i}", codes, partial(_plane, form, i), (count, *shape), dtype)
        for i, (shape, dtype) in enumerate(form.plane_shapes(outputs))
    ]
    scale = _turned(rewriter, f"{name}.step", weight.scale, form.scale)
    zero = None if weight.zero is None else _turned(rewriter, f"{name}.zero", weight.zero, "float")
    factor = _factor(rewriter, name, outer_of(program, weight), count) if form.outer else None
    parts: Sequence[Any] = (planes, scale, zero, factor, value_table(rewriter, form), str(form))
    node = found.result
    rewriter.replace(node, rewriter.call(node, EXPERT_LINEAR, found.x, found.expert, *parts))
    keys = tuple(program.key(plane) for plane in planes)
    stored = (*keys, *(program.key(part) for part in (scale, zero, factor) if part is not None))
    index.append(PackedWeight(name, str(form), keys, stored, 0, outputs, outputs, stacked=count))


def _plane(form: WeightFormat, plane: int, codes: Tensor) -> Tensor:
    return torch.stack([form.pack(expert)[plane] for expert in codes])


def _turned(rewriter: Rewriter, key: str, part: fx.Node, kind: str) -> fx.Node:
    """Parameters [E, N / rows, G] as [E, G, N / rows]; bytes where they are no plain floats."""
    shape = [int(size) for size in shape_of(part)]
    dtype = torch.uint8 if kind != "float" else part.meta["val"].dtype

    def compute(stored: Tensor) -> Tensor:
        return stored.transpose(1, 2).contiguous().view(dtype)

    keys = (rewriter.program.key(part),)
    return rewriter.derive(key, keys, compute, (shape[0], shape[2], shape[1]), dtype)


def _factor(rewriter: Rewriter, name: str, outer: Sequence[fx.Node], count: int) -> fx.Node:
    """The global scales of the experts; one that they share, for each of them."""

    def compute(stored: Tensor) -> Tensor:
        return stored.reshape(-1).expand(count).contiguous()

    keys = (rewriter.program.key(outer[0]),)
    return rewriter.derive(f"{name}.factor", keys, compute, (count,), torch.float32)
