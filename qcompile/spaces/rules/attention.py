"""Attention as one operator."""

from __future__ import annotations

import torch
from torch import fx

from qcompile.spaces.layout import Layout, plain, product
from qcompile.spaces.registry import rule
from qcompile.spaces.rules.pairing import Operand, multiplied
from qcompile.spaces.rules.views import repeated
from qcompile.spaces.walk import Walk, sizes

aten = torch.ops.aten


@rule(
    aten.scaled_dot_product_attention.default,
    says="v's channels pass to the output, head by head, and all query heads of a group share one T; q and k are"
    " paired: T and T⁻ᵀ",
)
def attention(walk: Walk, node: fx.Node) -> Layout | list[Layout]:
    query, key, value = (walk.of(walk.program.arg(node, name)) for name in ("query", "key", "value"))
    mask = walk.program.arg(node, "attn_mask")
    if isinstance(mask, fx.Node) and walk.of(mask).has_wires:
        return walk.barrier(node, "is masked by what the channels hold")
    if query.rank < 3:
        return walk.barrier(node, "attends without a batch")
    heads = query.rank - 3
    if walk.program.arg(node, "enable_gqa"):
        key, value = (_shared(x, heads, int(product(query.axes[heads]))) for x in (key, value))
    batch = [f"b{i}" for i in range(query.rank - 2)]
    scores = multiplied(
        walk, node, Operand(query, [*batch, "q", "d"]), Operand(key, [*batch, "t", "d"]), [*batch, "q", "t"]
    )
    if isinstance(scores, list):
        return scores
    shape = sizes(node)
    weights = plain([*shape[:-1], sizes(walk.program.arg(node, "key"))[-2]])
    result = multiplied(
        walk, node, Operand(weights, [*batch, "q", "t"]), Operand(value, [*batch, "t", "e"]), [*batch, "q", "e"]
    )
    return result


def _shared(layout: Layout, axis: int, heads: int) -> Layout:
    """Each head of a group, as often as it is read."""
    times = heads // int(product(layout.axes[axis]))
    return layout if times == 1 else repeated(layout, axis, times)
