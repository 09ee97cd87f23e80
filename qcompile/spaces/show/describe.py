"""`describe`: what the analysis found, as plain data: for tables, JSON, pictures and the reports of passes.

Spaces that meet the same weights are one description: the 32 head spaces of a layer, or what a diagonal and an
orthogonal T may both act on. Wires that nothing may act on get a description too, so that each weight's axis is in one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import fx

from qcompile.ir.contractions import short_name
from qcompile.ir.moves import MOVES
from qcompile.ir.program import Program
from qcompile.spaces.analysis import ChannelSpaces
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout
from qcompile.spaces.show.reasons import Reason, Reasons
from qcompile.spaces.space import Placement, Space
from qcompile.spaces.walk import Use
from qcompile.spaces.wires import MIXING, Level

aten = torch.ops.aten
NAMES = {
    Level.PERMUTATION: "permutation",
    Level.DIAGONAL: "diagonal",
    Level.ORTHOGONAL: "orthogonal",
    Level.LINEAR: "linear",
}
_NORMS = (aten.rms_norm.default, aten.layer_norm.default, aten.group_norm.default, aten.batch_norm.default)


@dataclass(frozen=True)
class Blocks:
    """Spaces of one level that meet the same weights: heads, each with a T of its own."""

    level: Level
    widths: tuple[int, ...]

    def __str__(self) -> str:
        name = NAMES[self.level] if self.level is not Level.LINEAR else "general linear"
        return name if len(self.widths) == 1 else f"{name}, {len(self.widths)} × {self.widths[0]}"


@dataclass(frozen=True)
class End:
    """Where channels meet one axis of a weight."""

    role: str  # "product", "embedding", "gain", "bias" or "constant"
    weight: str
    axis: int
    node: str
    operator: str
    module: str
    copies: int  # how often the axis holds each channel
    inverse: bool  # a diagonal T enters as its inverse on some of them


@dataclass(frozen=True)
class Description:
    """Channels that move together, the weights they meet, what may act on them and what forbids more."""

    kind: str  # "stream", "heads", "query·key", "hidden", "norm", "output" or "constant"
    blocks: tuple[Blocks, ...]  # the levels at which there are such spaces, smallest group first
    width: int  # channels in all
    sources: tuple[End, ...]
    sinks: tuple[End, ...]
    absorbers: tuple[End, ...]  # gains: a diagonal can end there
    meets: tuple[str, ...]  # norms, attentions, caches: "norm rms_norm", "query …", "state …"
    ties: tuple[str, ...]  # weights that something else reads too
    reasons: tuple[Reason, ...]  # against each level that is not admitted
    spaces: tuple[Space, ...] = field(repr=False, compare=False)
    wires: Ids = field(repr=False, compare=False)  # where it meets weights

    @property
    def levels(self) -> tuple[Level, ...]:
        """What may act on it."""
        return tuple(b.level for b in self.blocks)

    def admits(self, level: Level) -> bool:
        """Whether every T of a level may act on it, in blocks; a larger group has the smaller ones in it."""
        inside = {Level.LINEAR: set(Level), Level.ORTHOGONAL: {Level.ORTHOGONAL, Level.PERMUTATION}}
        return any(level in inside.get(have, {have}) for have in self.levels)

    @property
    def ends(self) -> tuple[End, ...]:
        """Every meeting with a weight."""
        return (*self.sources, *self.absorbers, *self.sinks)

    @property
    def next_levels(self) -> tuple[Level, ...]:
        """The smallest groups that are not admitted."""
        have = self.levels
        if not have:
            return tuple(Level)
        if Level.ORTHOGONAL in have or Level.LINEAR in have:
            return () if Level.LINEAR in have else (Level.LINEAR,)
        return tuple(level for level in (Level.DIAGONAL, Level.ORTHOGONAL) if level not in have)

    @property
    def limiting(self) -> tuple[Reason, ...]:
        """The reasons against the next levels."""
        return tuple(r for r in self.reasons if set(self.next_levels) & set(r.levels))

    @property
    def around(self) -> str | None:
        """The pass that rotates what it holds when the model runs, where no fused rotation can."""
        if Level.ORTHOGONAL in self.levels or Level.LINEAR in self.levels:
            return None
        return (
            "rotate(qk=true)" if self.kind == "query·key" else "rotate(orphans=true)" if self.kind == "hidden" else None
        )


def describe(spaces: ChannelSpaces) -> list[Description]:
    """Descriptions in program order of what they first meet."""
    number = {use: i for i, use in enumerate(spaces.uses)}
    found: dict[tuple[int, ...], list[Space]] = defaultdict(list)
    covered: dict[Use, list[Ids]] = defaultdict(list)
    for level in Level:
        for space in spaces[level]:
            if level is Level.LINEAR and space.of_kind("norm"):
                continue  # a norm reads it: T may be added up there, but not be undone
            if space.width == 1 and level in MIXING:
                continue  # there is nothing to mix it with
            found[tuple(sorted({number[p.use] for p in space.placements if p.use.weight is not None}))].append(space)
            for p in space.placements:
                covered[p.use].append(p.positions.ravel())
    teller = _Teller(spaces)
    result = [(key[0], teller.of_spaces(same)) for key, same in found.items()]
    for same in _uncovered(spaces, covered, teller.reasons.roots[Level.PERMUTATION]):
        meeting = [number[use] for use, _ in same if use.weight is not None]
        if meeting:
            result.append((meeting[0], teller.of_wires(same)))
    return [d for _, d in sorted(result, key=lambda pair: pair[0])]


def _uncovered(spaces: ChannelSpaces, covered: dict[Use, list[Ids]], root: Ids) -> list[list[tuple[Use, Ids]]]:
    """Wires of uses that no space takes, those with common classes together."""
    left: list[tuple[Use, Ids]] = []
    groups: list[int] = []
    owner: dict[int, int] = {}  # class → its group
    for use in spaces.uses:
        free = use.ids >= 0
        for positions in covered.get(use, ()):
            free[positions] = False
        if not free.any():
            continue
        ids = use.ids[free]
        classes = np.unique(root[ids]).tolist()
        met = {owner[c] for c in classes if c in owner}
        group = min(met, default=len(left))
        if len(met) > 1:
            owner = {c: group if g in met else g for c, g in owner.items()}
            groups = [group if g in met else g for g in groups]
        owner.update(dict.fromkeys(classes, group))
        left.append((use, ids))
        groups.append(group)
    return [[item for item, g in zip(left, groups, strict=True) if g == group] for group in dict.fromkeys(groups)]


class _Teller:
    """Makes descriptions; what they share is computed once."""

    def __init__(self, spaces: ChannelSpaces) -> None:
        self.spaces, self.program, self.reasons = spaces, spaces.program, Reasons(spaces)
        readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        for use in spaces.uses:
            if use.weight is not None:
                readers[use.weight].add(use.node)
        self.tied = {weight for weight, nodes in readers.items() if len(nodes) > 1}

    def of_spaces(self, spaces: list[Space]) -> Description:
        widths: dict[Level, list[int]] = defaultdict(list)
        first: dict[Use, Placement] = {}
        for space in spaces:
            widths[space.level].append(space.width)
            for p in space.placements:
                kept = first.setdefault(p.use, p)
                if kept.inverse is None and p.inverse is not None:
                    first[p.use] = p
        blocks = tuple(Blocks(level, tuple(sorted(w, reverse=True))) for level, w in sorted(widths.items()))
        ids = np.concatenate([p.use.ids[p.positions.ravel()] for s in spaces for p in s.placements if p.use.weight])
        copies = {use: len(p.positions) for use, p in first.items()}
        inverse = {use for use, p in first.items() if p.inverse is not None and p.inverse.any()}
        width = max(sum(w) for w in widths.values())
        return self._description(blocks, width, list(first), copies, inverse, tuple(spaces), ids)

    def of_wires(self, same: list[tuple[Use, Ids]]) -> Description:
        width = max(len(ids) for _, ids in same)
        return self._description(
            (), width, [use for use, _ in same], {}, set(), (), np.concatenate([i for _, i in same])
        )

    def _description(
        self,
        blocks: tuple[Blocks, ...],
        width: int,
        uses: list[Use],
        copies: dict[Use, int],
        inverse: set[Use],
        spaces: tuple[Space, ...],
        ids: Ids,
    ) -> Description:
        ends = [(u.kind, _end(self.spaces, u, copies.get(u, 1), u in inverse)) for u in uses if u.weight is not None]
        sources = tuple(e for kind, e in ends if kind == "source" and e.role != "gain")
        absorbers = tuple(e for kind, e in ends if kind == "source" and e.role == "gain")
        sinks = tuple(e for kind, e in ends if kind == "sink")
        others = [u for u in uses if u.weight is None]
        kind = _kind({u.kind for u in others}, blocks, sources, sinks, bool(absorbers))
        wanted = [level for level in Level if not any(b.level is level for b in blocks)]
        return Description(
            kind,
            blocks,
            width,
            sources,
            sinks,
            absorbers,
            tuple(dict.fromkeys(f"{u.kind} {u.node.name}" for u in others)),
            tuple(
                dict.fromkeys(
                    self.program.key(u.weight) for u in uses if u.weight in self.tied and u.weight is not None
                )
            ),
            self.reasons.of(ids[ids >= 0], wanted),
            spaces,
            ids,
        )


def _kind(
    meets: set[str], blocks: tuple[Blocks, ...], sources: tuple[End, ...], sinks: tuple[End, ...], gains: bool
) -> str:
    made = [e for e in sources if e.role in ("product", "embedding")]
    if meets & {"query", "key"}:
        return "query·key"
    if "state" in meets or any(len(b.widths) > 1 for b in blocks if b.level in MIXING):
        return "heads"
    if not made and not sinks:
        return "constant"
    if not made and gains:
        return "norm"
    if len(made) > 1 and ("norm" in meets or len(sinks) > 1):
        return "stream"
    return "hidden" if sinks else "output"


def _end(spaces: ChannelSpaces, use: Use, copies: int, inverse: bool) -> End:
    weight, program = use.weight, spaces.program
    assert weight is not None
    reader = use.node
    if use.node is weight:
        role = operator = _role(spaces, weight)
        reader = next(iter(weight.users), weight)
    else:
        role = "embedding" if use.node.target is aten.embedding.default else "product"
        operator = short_name(use.node)
    key, module = program.key(weight), program.module_of(reader)
    return End(role, key, use.axis, use.node.name, operator, module, copies, inverse)


def _role(spaces: ChannelSpaces, weight: fx.Node) -> str:
    """What a weight that is no matrix does where it is first used."""
    todo = list(weight.users)
    while todo:
        user = todo.pop(0)
        if user.target in MOVES:
            todo += user.users
        elif user.target in _NORMS:
            return "gain" if spaces.program.arg(user, "weight") is weight else "bias"
        elif user.target in (aten.mul.Tensor, aten.div.Tensor):
            layouts = [spaces.layouts.get(n) for n in user.all_input_nodes if n is not weight]
            return "gain" if any(isinstance(x, Layout) and x.has_wires for x in layouts) else "constant"
        elif user.target in (aten.add.Tensor, aten.sub.Tensor) or _is_bias(spaces.program, user, weight):
            return "bias"
    return "constant"


def _is_bias(program: Program, user: fx.Node, weight: fx.Node) -> bool:
    if not isinstance(user.target, torch._ops.OpOverload):
        return False
    names = {a.name for a in user.target._schema.arguments}
    return any(name in names and program.arg(user, name) is weight for name in ("bias", "self"))
