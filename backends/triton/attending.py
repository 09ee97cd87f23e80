"""Attention that reads a cache of int8 codes reads them as they are.

    k = dequantize(codes_k, s_k); v = dequantize(codes_v, s_v)
    scaled_dot_product_attention(q, repeat(k), repeat(v), mask)   ⟶   attend_codes(q, codes_k, s_k, codes_v, s_v, mask)

`repeat` is what spreads key-value heads over query heads, in any spelling that is views of the whole.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import fx

from qcompile.backends.onnx_qcdq.recognise import DEQUANTIZE, parse_spec, same, shape_of
from qcompile.backends.onnx_qcdq.rewriting import Rewriter
from qcompile.backends.triton.matching import FLOATS
from qcompile.backends.triton.ops.attention import ATTEND_CODES
from qcompile.ir.program import Program
from qcompile.numerics.element import IntElement

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
_PASSED = {aten.clone.default, aten.contiguous.default}


def lower_attention(rewriter: Rewriter) -> tuple[int, list[str]]:
    """How many calls were replaced, and why others that read a cache of codes were not."""
    program, count, reasons = rewriter.program, 0, []
    for node in program.calls(SDPA):
        caches = [_cache(program, program.arg(node, name), node) for name in ("key", "value")]
        if None in caches:
            if any(_reads_codes(program, program.arg(node, name)) for name in ("key", "value")):
                reasons.append("its cache is not int8 with a symmetric float32 scale a token, or heads are mixed")
            continue
        if (reason := _unfit(program, node)) is not None:
            reasons.append(reason)
            continue
        q, mask, scale = (program.arg(node, name) for name in ("query", "attn_mask", "scale"))
        factor = 1 / math.sqrt(int(shape_of(q)[-1])) if scale is None else float(scale)
        parts = [part for cache in caches if cache is not None for part in cache]
        rewriter.replace(node, rewriter.call(node, ATTEND_CODES, q, *parts, mask, factor))
        count += 1
    return count, reasons


def _unfit(program: Program, node: fx.Node) -> str | None:
    mask, q = program.arg(node, "attn_mask"), program.arg(node, "query")
    if program.arg(node, "is_causal") or float(program.arg(node, "dropout_p")):
        return "attention that masks or drops by itself has no kernel"
    if q.meta["val"].dtype not in FLOATS or shape_of(q)[-1] != shape_of(node)[-1]:
        return "queries and values are of different widths, or of a type without a kernel"
    if mask is not None and (mask.meta["val"].dtype != torch.bool or not _one_head(mask)):
        return "the mask is no bool [batch, 1, tokens, all tokens]"
    return None


def _one_head(mask: fx.Node) -> bool:
    shape = shape_of(mask)
    return len(shape) == 4 and same(shape[1], 1)


def _cache(program: Program, node: Any, at: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Codes and scales behind keys or values; None where they are something else."""
    source, repeats = _unrepeated(program, node)
    if source is None or source.target is not DEQUANTIZE:
        return None
    codes, scale = program.arg(source, "codes"), program.arg(source, "scale")
    spec, shape = parse_spec(str(program.arg(source, "spec"))), shape_of(source)
    fits = spec.element == IntElement(8) and spec.symmetric and scale.meta["val"].dtype == torch.float32
    heads = shape_of(program.arg(at, "query"))
    if not fits or program.is_weight(scale) or len(shape) != 4 or not same(shape_of(scale)[-1], 1):
        return None
    if not isinstance(shape[1], int) or not isinstance(heads[1], int) or shape[1] * repeats != heads[1]:
        return None
    return codes, scale


def _unrepeated(program: Program, node: Any) -> tuple[fx.Node | None, int]:
    """The value before its heads were repeated, and how often each was; None where it is anything but repeated whole.

    Repeating is an axis put behind the heads, expanded, and joined with them: [B, G, T, D] → [B, G, r, T, D] → [B, G·r,
    T, D].
    """
    if not isinstance(node, fx.Node):
        return None, 1
    if node.target is DEQUANTIZE:
        return node, 1
    if node.target in (aten.reshape.default, aten.view.default, aten._unsafe_view.default):
        return _joined(program, node)
    if node.target is aten.repeat_interleave.self_int and program.arg(node, "dim") == 1:
        source, repeats = _unrepeated(program, node.args[0])
        return source, repeats * int(program.arg(node, "repeats"))
    if node.target in _PASSED or (node.target is aten.slice.Tensor and _whole(program, node)):
        return _unrepeated(program, node.args[0])
    return None, 1


def _joined(program: Program, node: fx.Node) -> tuple[fx.Node | None, int]:
    expanded = _through(program, node.args[0])
    if expanded is None or expanded.target is not aten.expand.default:
        return None, 1
    lifted = _through(program, expanded.args[0])
    if lifted is None or lifted.target is not aten.unsqueeze.default or program.arg(lifted, "dim") != 2:
        return None, 1
    source, repeats = _unrepeated(program, lifted.args[0])
    wide, narrow = shape_of(expanded), shape_of(lifted)
    if len(wide) != 5 or any(not same(a, b) for i, (a, b) in enumerate(zip(wide, narrow, strict=True)) if i != 2):
        return None, 1
    joined = shape_of(node)
    if not isinstance(wide[2], int) or len(joined) != 4 or not same(joined[1], wide[1] * wide[2]):
        return None, 1
    return source, repeats * wide[2]


def _through(program: Program, node: Any) -> fx.Node | None:
    """Past copies and slices that take everything."""
    while isinstance(node, fx.Node) and (
        node.target in _PASSED or (node.target is aten.slice.Tensor and _whole(program, node))
    ):
        node = node.args[0]
    return node if isinstance(node, fx.Node) else None


def _whole(program: Program, node: fx.Node) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    return all(same(a, b) for a, b in zip(shape_of(node), shape_of(source), strict=True))


def _reads_codes(program: Program, node: Any) -> bool:
    source, _ = _unrepeated(program, node)
    return source is not None
