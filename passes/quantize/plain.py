"""A program as it was before anything was quantized, its nodes' names unchanged."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.passes.quantize.sites import QDQ, find_qdq


def without_rounding(program: Program) -> Program:
    """A copy of the program in which nothing is quantized but weights that are stored as codes.

    It is for runs with an empty cache: where the cache is kept as codes, what is read is the new tokens alone.
    """
    copy = program.clone()
    for place in find_qdq(copy):
        for node in decoders(copy, place):
            copy.replace(node, copy.arg(place.quantize, "x"))  # what place.source was may be replaced by now
    copy.refresh()
    return copy


def decoders(program: Program, place: QDQ) -> Sequence[fx.Node]:
    """What decodes the codes, at once or once they stand behind those of an input."""
    if place.dequantize:
        return place.dequantize
    decoded: list[fx.Node] = []
    seen, joined, waiting = {place.quantize}, False, [place.quantize]
    while waiting:
        for user in waiting.pop().users:
            if user in seen or user.op == "output":
                continue
            seen.add(user)
            if user.target is torch.ops.qcompile.dequantize.default:
                decoded.append(user)
                continue
            joined |= any(node.op == "placeholder" and not program.is_weight(node) for node in user.all_input_nodes)
            waiting.append(user)
    return decoded if joined else []
