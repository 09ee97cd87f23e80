"""`ChannelSpaces`: which transformations a program admits, on which channels, and what limits them."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.ir.state import state_pairs
from qcompile.spaces import rules
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout, plain
from qcompile.spaces.registry import RULES
from qcompile.spaces.sites import Keys
from qcompile.spaces.space import Groups, Placement, Space, placements
from qcompile.spaces.walk import Triple, Use, Walk, no_wires, sizes
from qcompile.spaces.wires import EVERY, Level, Limit, Wires

assert rules  # importing it fills the table


@dataclass(frozen=True, eq=False)
class ChannelSpaces:
    """The result of one walk; it speaks of the program as it was then."""

    program: Program
    wires: Wires
    uses: tuple[Use, ...]
    layouts: dict[fx.Node, Layout | list[Layout]]

    def __getitem__(self, level: Level) -> list[Space]:
        """Every space that admits `level`, in program order of its first use. Only diagonal ones may have width 1."""
        if level not in self._found:
            self._found[level] = self._spaces(level)
        return self._found[level]

    def space(self, node: fx.Node, kind: str, level: Level) -> Space | None:
        """The one space that all channels of a use at `node` belong to; None where there is no such one."""
        use = next((u for u in self.uses if u.node is node and u.kind == kind), None)
        if use is None:
            return None
        return next(
            (s for s in self[level] if any(p.use is use and p.positions.size == use.ids.size for p in s.placements)),
            None,
        )

    def spaces_of(self, node: fx.Node, kind: str, level: Level) -> list[Space] | None:
        """The spaces that all uses of a kind at `node` belong to, each whole; None where some channel is in none."""
        uses = {id(u): u.ids.size for u in self.uses if u.node is node and u.kind == kind}
        found: dict[int, Space] = {}
        for space in self[level]:
            for p in space.placements:
                if uses.get(id(p.use)) == p.positions.size:
                    del uses[id(p.use)]
                    found[id(space)] = space
        return None if uses else list(found.values())

    def limits(self, level: Level, ids: Ids) -> list[Limit]:
        """What forbids `level` on these wires, each operator once."""
        ids = ids[ids >= 0]
        events = np.unique(self._first_limits(level)[self.wires.forest(level).find(ids)])
        return [self.wires.events[e] for e in events if e >= 0]

    def all_limits(self, level: Level, ids: Ids) -> list[Limit]:
        """Everything that forbids `level` on these wires."""
        forest = self.wires.forest(level)
        wanted = np.unique(forest.find(ids[ids >= 0]))
        events = {e for limited, e in self.wires.restricted(level) if np.isin(forest.find(limited), wanted).any()}
        return [self.wires.events[e] for e in sorted(events)]

    @functools.cached_property
    def _first_limits(self) -> Callable[[Level], Ids]:
        # A cache on the method itself would hold every analysis, with its program, for good.
        return functools.cache(self.wires.first_limits)

    @functools.cached_property
    def _found(self) -> dict[Level, list[Space]]:
        return {}

    def _spaces(self, level: Level) -> list[Space]:
        uses = [u for u in self.uses if level in u.levels]
        forest, limits = self.wires.forest(level), self._first_limits(level)
        met = np.zeros(self.wires.count, bool)
        for use in uses:
            met[forest.find(use.ids[use.ids >= 0])] = True
        used = np.nonzero(met & (limits < 0))[0]
        if used.size == 0:
            return []
        least = 1 if level is Level.DIAGONAL else 2  # what is alone cannot be mixed
        groups = Groups.of(used, self.wires.signatures(level)[used], least, self.wires.count)
        found: dict[int, list[Placement] | None] = {}
        for use in uses:
            for number, placement in placements(use, groups, forest, self._vectors):
                have = found.setdefault(number, [])
                if placement is None or have is None:
                    found[number] = None
                else:
                    have.append(placement)
        return [
            Space(level, len(groups.group(number)), tuple(several), groups.group(number))
            for number, several in found.items()
            if several is not None and any(p.use.weight is not None for p in several)
        ]

    @functools.cached_property
    def _vectors(self) -> Callable[[Ids], Keys]:
        return self.wires.vectors()


def channel_spaces(program: Program) -> ChannelSpaces:
    """Walk over `program` once. The program is not changed."""
    walk = Walk(program, Wires(program.output_node, _room(program)))
    _states(walk)
    skipped = {node for node in walk.matrices if not program.is_weight(node)}
    for node in program.graph.nodes:
        if node.op == "call_function" and node not in skipped:
            walk.wires.node = node
            layout = _apply(walk, node)
            if layout is not None:
                walk.layouts[node] = layout
                tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
                if tensors and all(n in walk.constants for n in tensors):
                    walk.constants.add(node)
    walk.wires.node = program.output_node
    _ends(walk)
    _foreign(walk, skipped)
    _settle(walk)
    return ChannelSpaces(program, walk.wires, tuple(walk.uses), walk.layouts)


def _room(program: Program) -> int:
    """About how many wires a program has, and seldom fewer: memory that is never written costs nothing."""
    values = [n.meta.get("val") for n in program.nodes]
    total = sum(v.shape[-1] for v in values if isinstance(v, Tensor) and v.ndim and isinstance(v.shape[-1], int))
    return min(total, 1 << 25)


def _apply(walk: Walk, node: fx.Node) -> Layout | list[Layout] | None:
    value = node.meta.get("val")
    if not isinstance(value, (Tensor, tuple, list)):
        return None
    rule = RULES.get(node.target)
    if rule is None and node in walk.contractions:
        rule = RULES[_linear()]
    if rule is None:
        return walk.barrier(node, f"no rule for {node.target}") if walk.wired(node) else no_wires(node)
    return rule(walk, node)


def _linear() -> object:
    import torch

    return torch.ops.aten.linear.default


def _states(walk: Walk) -> None:
    """A cache starts with wires of its own: its basis is free, as long as what goes out is in the same."""
    for pair in state_pairs(walk.program):
        shape = sizes(pair.past)
        fixed = [isinstance(s, int) for s in shape]
        if not pair.past.meta["val"].dtype.is_floating_point or not fixed[-1]:
            continue
        wide = [int(s) if isinstance(s, int) else 1 for s in shape]
        vectors = np.broadcast_to(np.arange(int(np.prod(wide[:-1]))).reshape([*wide[:-1], 1]), wide)
        ids = walk.wires.fresh(vectors)
        walk.use(Use("state", pair.past, ids.ravel()))
        walk.layouts[pair.past] = plain(shape).with_ids(ids)


def _ends(walk: Walk) -> None:
    """What the program returns stays as it is; a cache goes out in the basis it comes in."""
    paired = {pair.present: pair.past for pair in state_pairs(walk.program)}
    for name, value in walk.program.outputs.items():
        if not isinstance(value, fx.Node) or not isinstance(value.meta.get("val"), Tensor):
            continue
        layout, past = walk.of(value), paired.get(name)
        before = walk.of(past) if past is not None else None
        if before is not None and before.has_wires and layout.ids.shape == before.ids.shape and layout.has_wires:
            walk.wires.join(layout.ids, before.ids)
            event = walk.wires.event(value, "a cache goes out with values that no weight makes")
            walk.wires.limit(EVERY, np.where(layout.ids < 0, before.ids, -1), event)
        else:
            walk.stop(layout, walk.program.output_node, f"is returned as {name!r}")
            if before is not None:
                walk.stop(before, walk.program.output_node, f"is not what {name!r} returns")


def _foreign(walk: Walk, skipped: set[fx.Node]) -> None:
    """A matrix that something else reads too, or reads in another way, must stay."""
    products = {*walk.contractions, *walk.embeddings}
    known = {
        (use.weight, use.node) for use in walk.uses
    }  # a product that stops all channels says nothing of its weight
    for use in list(walk.uses):
        if use.weight is None or use.node not in products:
            continue
        path = walk.contractions[use.node].path if use.node in walk.contractions else walk.embeddings[use.node].path
        readers = [user for n in (use.weight, *path) for user in n.users]
        others = [u for u in readers if u not in skipped and (u not in products or (use.weight, u) not in known)]
        if others:
            event = walk.wires.event(others[0], f"reads the weight {walk.program.key(use.weight)!r} as well")
            walk.wires.limit(EVERY, use.ids, event)


def _settle(walk: Walk) -> None:
    """Say for each product of channels whose scale passes to the result: the other factor's must then stay."""
    waiting = list(walk.triples)
    while waiting:
        limits, find = walk.wires.first_limits(Level.DIAGONAL), walk.wires.forest(Level.DIAGONAL).find
        pinned = [tuple(limits[find(ids)] >= 0 for ids in (t.a, t.b, t.out)) for t in waiting]
        left: list[Triple] = []
        for t, (fixed_a, fixed_b, fixed_out) in zip(waiting, pinned, strict=True):
            only_a, neither = fixed_a & ~fixed_b, ~fixed_a & ~fixed_b
            _pass(walk, t.b[fixed_b], t.a[fixed_b], t.out[fixed_b], t.event)
            _pass(walk, t.a[only_a], t.b[only_a], t.out[only_a], t.event)
            walk.wires.limit((Level.DIAGONAL,), t.a[neither & fixed_out], t.event)
            walk.wires.limit((Level.DIAGONAL,), t.b[neither & fixed_out], t.event)
            free = neither & ~fixed_out
            if free.any():
                left.append(Triple(t.a[free], t.b[free], t.out[free], t.event))
        if len(left) == len(waiting):
            for t in left:
                _pass(walk, t.b, t.a, t.out, t.event)
            left = []
        waiting = left


def _pass(walk: Walk, stays: Ids, goes: Ids, out: Ids, event: int) -> None:
    walk.wires.limit((Level.DIAGONAL,), stays, event)
    walk.wires.join(goes, out, (Level.DIAGONAL,))
