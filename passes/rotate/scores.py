"""Rotate queries and keys when the model runs, behind the rotary embedding.

    s = q·kᵀ          ⟶      s = hadamard(q)·hadamard(k)ᵀ

Exact. Keys are rotated before they go into the cache, where they are then stored with no channel that stands out.
"""

from __future__ import annotations

import itertools

import torch
from torch import fx

from qcompile.hadamard.construct import HadamardError, hadamard_for
from qcompile.ir.attention import Operand, find_attention
from qcompile.ir.moves import let_reshape
from qcompile.ir.program import Program
from qcompile.ir.state import state_pairs
from qcompile.pass_base import Report

aten = torch.ops.aten
TRANSFORM = torch.ops.qcompile.hadamard.default


def rotate_scores(program: Program, block: int | None, report: Report) -> int:
    """Rotate queries and keys of every attention online. Returns how many attentions there are."""
    count = 0
    pasts = {pair.past for pair in state_pairs(program)}
    for found in find_attention(program):
        width = found.query.source.meta["val"].shape[found.query.features]
        places = (found.query, found.key)
        reason = next((r for r in map(_unfit, places) if r is not None), None)
        if reason is not None:
            report.skip(found.context, reason)
            continue
        try:
            order, size = hadamard_for(int(width), block)
        except HadamardError as error:
            report.skip(found.context, str(error))
            continue
        for operand in places:
            _insert(program, operand, order, size, pasts)
        let_reshape(program, found.context)
        count += 1
        report.rewrote(found.context, f"R3: queries and keys are rotated online, {size} features")
    return count


def _unfit(operand: Operand) -> str | None:
    source = operand.source
    if operand.features != source.meta["val"].ndim - 1:
        return f"the features of {source.name} are not its last axis"
    if source.target is TRANSFORM:
        return f"{source.name} is rotated already"
    return None


def _insert(program: Program, operand: Operand, order: int, size: int, pasts: set[fx.Node]) -> None:
    """Rotate what an operand is moved from; other readers of it, and of what it is moved to, keep reading it as it was.

    New tokens are rotated before they go into a cache that nothing else reads: then each is rotated once.
    """
    source, alone = operand.source, _alone(operand)
    follower = operand.path[0] if operand.path else operand.reader
    parts = program.arg(source, "tensors") if source.target is aten.cat.default else []
    new = [part for part in parts if part not in pasts]
    cached = len(parts) == 2 and len(new) == 1 and all(user is follower or user.op == "output" for user in source.users)
    if alone and cached:
        follower, source = source, new[0]
    online = program.call(TRANSFORM, (source, order, size), after=source, module=program.module_of(operand.reader))
    if alone:
        follower.replace_input_with(source, online)
    else:
        _reread(program, operand, online)
    let_reshape(program, online)


def _alone(operand: Operand) -> bool:
    """Whether all that is moved on the way to an operand goes to it alone."""
    steps = [*operand.path, operand.reader]
    shared = any(list(node.users) != [after] for node, after in itertools.pairwise(steps))
    return not shared and _times(operand) == 1


def _times(operand: Operand) -> int:
    """How often the reader takes what it is given here."""
    return sum(argument is operand.node for argument in (*operand.reader.args, *operand.reader.kwargs.values()))


def _reread(program: Program, operand: Operand, online: fx.Node) -> None:
    """Let the reader take its operand from `online`, by moves of its own."""
    copies = {operand.source: online}
    for node in operand.path:
        args = fx.map_arg(node.args, lambda n: copies.get(n, n))
        kwargs = dict(fx.map_arg(node.kwargs, lambda n: copies.get(n, n)))
        module = program.module_of(node)
        copies[node] = program.call(node.target, args, kwargs, before=operand.reader, module=module)  # type: ignore[arg-type]
    last = copies[operand.node]
    if operand.index is None:
        program.set_arg(operand.reader, operand.argument, last)
        return
    listed = list(program.arg(operand.reader, operand.argument))
    listed[operand.index] = last
    program.set_arg(operand.reader, operand.argument, listed)
