"""Spell out a fused attention, so that its weights can be quantized. Exact in real arithmetic.

    y = scaled_dot_product_attention(q, k, v, mask)  ⟶  a = where(mask, mul(matmul(q, kᵀ), scale), -inf)
                                                        y = matmul(softmax(a), v)

An additive mask is added, a causal one made. As in the operator, a query whose keys are all masked gets zeros
(`aten._safe_softmax`), and float16 and bfloat16 are computed in float32 and rounded once, at the end.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from qcompile.ir.moves import let_reshape
from qcompile.ir.program import Program

aten = torch.ops.aten

_NAMES: dict[Any, str] = {aten.matmul.default: "matmul", aten._safe_softmax.default: "softmax"}


def why_not(program: Program, node: fx.Node) -> str | None:
    """Why a fused attention has no such form; None where it has."""
    if program.arg(node, "dropout_p"):
        return f"it drops out weights (dropout_p={program.arg(node, 'dropout_p')}); export the model in eval mode"
    heads = [program.arg(node, name).meta["val"].shape[-3:-2] for name in ("query", "key", "value")]
    if program.arg(node, "enable_gqa") and not all(len(h) == 1 and isinstance(h[0], int) for h in heads):
        return "it repeats keys for a number of heads that is known at run time only"
    return None


def spell_out(program: Program, node: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Replace a fused attention; returns its softmax and the product of that with the values."""

    def call(target: Callable[..., Any], *args: Any, **kwargs: Any) -> fx.Node:
        return program.call(target, args, kwargs, before=node, name=_NAMES.get(target))

    query, key, value = (program.arg(node, name) for name in ("query", "key", "value"))
    heads, features = query.meta["val"].shape[-3:-2], query.meta["val"].shape[-1]
    dtype = query.meta["val"].dtype
    work = torch.promote_types(dtype, torch.float32)
    if work != dtype:
        query, key, value = (call(aten.to.dtype, x, work) for x in (query, key, value))
    if program.arg(node, "enable_gqa"):
        key, value = (_repeated(x, int(heads[0]), call) for x in (key, value))
    scores = call(aten.matmul.default, query, call(aten.transpose.int, key, -2, -1))
    scale = program.arg(node, "scale")
    scores = call(aten.mul.Tensor, scores, 1 / math.sqrt(features) if scale is None else scale)
    mask = program.arg(node, "attn_mask")
    if program.arg(node, "is_causal"):
        lengths = [_size(scores, axis, call) for axis in (-2, -1)]
        mask = call(aten.ones.default, lengths, dtype=torch.bool, device=scores.meta["val"].device)
        mask = call(aten.tril.default, mask)
    if mask is not None and mask.meta["val"].dtype == torch.bool:
        scores = call(aten.where.ScalarOther, mask, scores, -math.inf)
    elif mask is not None:
        scores = call(aten.add.Tensor, scores, mask)
    softmax = call(aten._safe_softmax.default, scores, -1)
    product = call(aten.matmul.default, softmax, value)
    result = product if work == dtype else call(aten.to.dtype, product, dtype)
    let_reshape(program, node)
    program.replace(node, result)
    return softmax, product


def _repeated(x: fx.Node, heads: int, call: Callable[..., fx.Node]) -> fx.Node:
    times = heads // int(x.meta["val"].shape[-3])
    return x if times == 1 else call(aten.repeat_interleave.self_int, x, times, -3)


def _size(node: fx.Node, axis: int, call: Callable[..., fx.Node]) -> Any:
    size = node.meta["val"].shape[axis]
    return size if isinstance(size, int) else call(aten.sym_size.int, node, axis)
