"""Rotations that are computed when the model runs.

    z = linear(x, W)          ⟶      z = linear(hadamard(x), W·Tᵀ)

    s = q·kᵀ                  ⟶      s = hadamard(q)·hadamard(k)ᵀ

Exact. Products that read one tensor share one Hadamard transform.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.hadamard.construct import HadamardError, hadamard_for
from qcompile.hadamard.rotation import Hadamard, Rotation
from qcompile.ir.attention import Operand, find_attention
from qcompile.ir.contractions import Contraction, find_contractions, roles
from qcompile.ir.edits import WeightEdit
from qcompile.ir.moves import MOVES, axis_back, moved
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.passes.quantize.spell_attention import let_reshape
from qcompile.spaces.apply import part_weight
from qcompile.spaces.rules.products import part_of

aten = torch.ops.aten
TRANSFORM = torch.ops.qcompile.hadamard.default


def rotate_inputs(program: Program, block: int | None, report: Report, wanted: Callable[[fx.Node], bool]) -> int:
    """Rotate the input of every wanted product online, and its weight to fit. Returns how many transforms there are."""
    contractions = find_contractions(program)
    kinds = roles(program, contractions)
    readers: dict[tuple[fx.Node, int], list[Contraction]] = {}
    for c in contractions:
        if not wanted(c.node):
            continue
        if kinds[c.node] in ("head", "router", "convolution"):
            report.skip(c.node, f"a {kinds[c.node]}: its input is not rotated online")
        else:
            readers.setdefault((c.input, c.input_axis), []).append(c)
    done: set[fx.Node] = set()
    for (x, axis), same in readers.items():
        reason = _rotate_input(program, x, axis, same, block, report, done)
        for c in same:
            if reason is None:
                report.rewrote(c.node, f"R4: its input is rotated online, with {len(same) - 1} others")
            else:
                report.skip(c.node, reason)
    return sum(1 for n in program.nodes if n.target is TRANSFORM and n.meta.get("rotates") == "input")


def _rotate_input(
    program: Program, x: fx.Node, axis: int, same: list[Contraction], block: int | None, report: Report, done: set[fx.Node]
) -> str | None:
    x, axis, followers = _before_moves(program, x, axis, same)
    width = x.meta["val"].shape[axis]
    if not isinstance(width, int) or axis != x.meta["val"].ndim - 1:
        return "the channels of its input are not the last axis, or of no fixed width"
    if any("qcompile" in str(step.target) for c in same for step in c.path):
        return "its weight is quantized already"
    if not all(_in_blocks(program, c, width) for c in same):
        return "it reads a part of its weight that is no run of blocks"
    try:
        order, size = hadamard_for(width, block)
    except HadamardError as error:
        return str(error)
    first = min(followers, key=lambda node: _place(program, node))
    online = program.call(TRANSFORM, (x, order, size), before=first, module=program.module_of(same[0].node))
    online.meta["rotates"] = "input"
    for follower in followers:
        follower.replace_input_with(x, online)
    for c in same:
        weight = c.weight
        outside = [user for user in _readers(program, weight) if user not in {d.node for d in same}]
        if outside or weight in done:
            weight = part_weight(program, weight, [c.node], report) if weight not in done or outside else weight
        if weight not in done:
            program.edit_weight(weight, Rotated(c.axis_in, Hadamard(weight.meta["val"].shape[c.axis_in], size)))
            done.add(weight)
    return None


def _in_blocks(program: Program, c: Contraction, width: int) -> bool:
    """Whether the input's channels are the weight's axis, or one of several runs of it, each for an expert."""
    places = part_of(program, c, c.axis_in, width)
    if places is None or isinstance(places, str):
        return places is None
    return np.array_equal(places.ravel(), np.arange(c.weight.meta["val"].shape[c.axis_in]))


@dataclass(frozen=True, eq=False)
class Rotated(WeightEdit):
    """A weight rotated along one axis."""

    axis: int
    rotation: Rotation

    def apply(self, tensor: Tensor) -> Tensor:
        """The weight after the rotation."""
        return self.rotation.apply(tensor, self.axis)


def _before_moves(
    program: Program, x: fx.Node, axis: int, same: list[Contraction]
) -> tuple[fx.Node, int, list[fx.Node]]:
    """Where the channels are the last axis: what `x` is moved from, and who reads that on the way to the products."""
    followers = [c.node for c in same]
    while axis != x.meta["val"].ndim - 1 and len(x.users) == len(followers):
        source = moved(program, x)
        back = axis_back(program, x, axis) if source is not None else None
        if source is None or back is None or source.meta["val"].shape[back] != x.meta["val"].shape[axis]:
            break
        x, axis, followers = source, back, [x]
    return x, axis, followers


def _readers(program: Program, weight: fx.Node) -> list[fx.Node]:
    """The calls that use a weight, past moves."""
    found: list[fx.Node] = []
    todo = list(weight.users)
    while todo:
        user = todo.pop()
        if user.target in MOVES:
            todo += user.users
        else:
            found.append(user)
    return found


def _place(program: Program, node: fx.Node) -> int:
    return next(i for i, n in enumerate(program.graph.nodes) if n is node)


def rotate_scores(program: Program, block: int | None, report: Report) -> int:
    """Rotate queries and keys of every attention online. Returns how many attentions there are."""
    count = 0
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
            _insert(program, operand, order, size)
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


def _insert(program: Program, operand: Operand, order: int, size: int) -> None:
    """Rotate what an operand is moved from; other readers of it keep reading it as it was."""
    source = operand.source
    follower = operand.path[0] if operand.path else operand.reader
    online = program.call(TRANSFORM, (source, order, size), after=source, module=program.module_of(operand.reader))
    follower.replace_input_with(source, online)
    let_reshape(program, online)
