"""Rotate channel spaces by orthogonal T, so that no channel stands out.

    W_source ← T·W_source        W_sink ← W_sink·Tᵀ          the function stays, the numbers spread

`stream`: every residual stream and every other space that a norm carries on (R1). `heads`: values to output
projection, head by head (R2). Both are folded into weights and cost nothing when the model runs. `qk`: queries and keys
behind the rotary embedding (R3), and `orphans`: whatever else a product reads, such as the down-projection's input
(R4), get a `qcompile::hadamard` in front of them.

What a rotation spreads, it spreads over its own channels: over few of them, in a narrow head. `joint` rotates all heads
together in front of the output projection instead, when the model runs.

Exact. A space that its operators forbid to rotate is reported with the operator: fold-norm-affine and center-norm come
first. QuaRot (Ashkboos et al. 2024) and SpinQuant (Liu et al. 2024) have the four places.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from qcompile.hadamard.construct import HadamardError
from qcompile.hadamard.rotation import Hadamard, RandomOrthogonal, Rotation
from qcompile.ir.attention import find_attention
from qcompile.ir.contractions import Contraction, find_contractions, roles
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.rotate.inputs import TRANSFORM, rotate_inputs
from qcompile.passes.rotate.scores import rotate_scores
from qcompile.spaces import ChannelSpaces, Level, Space, channel_spaces
from qcompile.spaces.apply import Edits
from qcompile.spaces.show import account, describe, left_alone


@register
@dataclass(frozen=True)
class Rotate(Pass):
    """Rotate every space that admits it.

    Args:
        stream, heads: fused rotations R1 and R2.
        qk, orphans: online rotations R3 and R4.
        joint: R2 online, over all heads that a product reads; a cache then holds values as they were.
        mode: a Hadamard matrix with random signs, without, or a random orthogonal matrix. What is online is always a
            Hadamard matrix without signs.
        block: rotate runs of so many channels by themselves; null for whole spaces.
        seed: of signs and random matrices.

    Raises HadamardError where no Hadamard matrix of a width is known.
    """

    name: ClassVar[str] = "rotate"

    stream: bool = True
    heads: bool = True
    qk: bool = False
    orphans: bool = False
    joint: bool = False
    mode: Literal["hadamard", "signed-hadamard", "random"] = "signed-hadamard"
    block: int | None = None
    seed: int = 0

    def run(self, program: Program) -> Report:
        """Rotate; the report has every space, rotated or left alone because of which operator."""
        report, spaces = Report(), channel_spaces(program)
        found, fates = describe(spaces), {}
        edits = Edits(spaces, report)
        counts = {"R1": 0, "R2": 0, "R3": 0, "R4": 0}
        heads: dict[int, Rotation] = {}
        joint = _several_heads(spaces) if self.joint and self.heads else set()
        for space in spaces[Level.ORTHOGONAL]:
            which = "R1" if space.is_stream else "R2"
            if (reason := self._passed_over(space, joint)) is not None:
                fates[space] = left_alone(reason)
                continue
            try:
                rotation = self._rotation(space.width, self.seed + counts["R1"]) if which == "R1" else None
                rotation = rotation or heads.setdefault(space.width, self._rotation(space.width, self.seed))
            except HadamardError as error:
                report.skip(space.name, str(error))
                fates[space] = left_alone(str(error))
                continue
            edits.rotate(space, rotation)
            counts[which] += 1
            fates[space] = f"{which}: {rotation}"
            report.rewrote(space.name, f"{which}: {rotation}, {len(space.sources)} sources, {len(space.sinks)} sinks")
        self._left_alone(spaces, report)
        edits.commit()
        if self.qk:
            counts["R3"] = rotate_scores(program, self.block, report)
        if joint:
            others = {c.node for c in find_contractions(program)} - joint
            counts["R2"] += rotate_inputs(program, online_products(program, report, others), self.block, report)
        if self.orphans:
            fixed = {p.node for s in spaces[Level.ORTHOGONAL] if s.width > 1 for p in s.sinks}
            counts["R4"] = rotate_inputs(program, online_products(program, report, fixed), self.block, report)
        report.measure("rotations", {k: float(v) for k, v in counts.items()})
        report.spaces = account(spaces, found, Level.ORTHOGONAL, fates, _online(program))
        return report

    def _passed_over(self, space: Space, joint: set[fx.Node]) -> str | None:
        """Why a space that may be rotated is not."""
        if not space.sinks:
            return "no product reads it"
        if not space.is_stream and any(p.node in joint for p in space.sinks):
            return "joint=true rotates it with the other heads"
        if not (self.stream if space.is_stream else self.heads):
            return f"{'stream' if space.is_stream else 'heads'}=false"
        return "one channel has nothing to mix with" if space.width == 1 else None

    def _rotation(self, width: int, seed: int) -> Rotation:
        if self.mode == "random":
            return RandomOrthogonal(width, seed)
        return Hadamard.of(width, self.block, seed if self.mode == "signed-hadamard" else None)

    def _left_alone(self, spaces: ChannelSpaces, report: Report) -> None:
        """What norms read and what attention gives, where it could not be rotated."""
        taken = {id(p.use) for s in spaces[Level.ORTHOGONAL] if s.width > 1 for p in s.placements}
        said: set[str] = set()
        for use in spaces.uses:
            if use.kind != ("norm" if self.stream else "none") or id(use) in taken:
                continue
            limits = spaces.all_limits(Level.ORTHOGONAL, use.ids)
            reasons = "; ".join(map(str, limits[:3])) or f"{use.node.name}: its channels are no one vector"
            if reasons not in said:
                said.add(reasons)
                report.skip(use.node, reasons)


def _several_heads(spaces: ChannelSpaces) -> set[fx.Node]:
    """Products that read several vectors side by side, and whatever else reads one of those."""
    heads = [s for s in spaces[Level.ORTHOGONAL] if s.width > 1 and not s.is_stream]
    copies = Counter[fx.Node]()
    for p in (p for space in heads for p in space.sinks):
        copies[p.node] += len(p.positions)
    several = [s for s in heads if any(copies[p.node] > 1 for p in s.sinks)]
    return {p.node for space in several for p in space.sinks}


def _online(program: Program) -> set[str]:
    """Names of products and attentions that read what is rotated when the model runs."""
    read = [(c.node, c.input) for c in find_contractions(program)]
    read += [(found.context, found.query.source) for found in find_attention(program)]
    return {node.name for node, source in read if source.target is TRANSFORM}


def online_products(program: Program, report: Report, fixed: set[fx.Node]) -> list[Contraction]:
    """Products whose inputs are worth a transform: linear layers and experts that are not in `fixed`."""
    contractions = find_contractions(program)
    kinds = roles(program, contractions)
    found = []
    for c in contractions:
        if c.node in fixed:
            continue
        if kinds[c.node] in ("head", "router", "convolution"):
            report.skip(c.node, f"a {kinds[c.node]}: its input is not rotated online")
        else:
            found.append(c)
    return found
