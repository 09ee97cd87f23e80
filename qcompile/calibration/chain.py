"""Where a program is cut, found from the graph: a chain of stages with as little as possible between them.

    embed │ norm ▸ q k v │ attention ▸ o │ + │ norm ▸ gate up │ act·mul ▸ down │ + │ …          │ a segment, ▸ a stage

A *target* is a product, or another place, whose input is looked at. A segment lies between two points where only the
residual stream is alive, beside values that live through most of the program (an encoder's output) and what inputs
alone decide (masks, rotary tables). A stage begins where an input that targets read is there, so that it can be looked
at when all that was computed before it is settled.
"""

from __future__ import annotations

import operator
from bisect import bisect_right
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from torch import fx

from qcompile.ir.contractions import Obstacle, survey
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Target:
    """A place `at` whose input `value` is looked at; with `changes`, what `at` computes depends on what is found."""

    at: fx.Node
    value: fx.Node
    changes: bool = True


@dataclass(frozen=True)
class Stage:
    """One step of the chain: from the values `starts` to the values `ends`, both by name."""

    segment: int
    starts: tuple[str, ...]
    ends: tuple[str, ...]
    targets: tuple[Target, ...] = field(repr=False)


@dataclass(frozen=True)
class Chain:
    """All stages in order. `carried` are the values that live through most of the program."""

    stages: tuple[Stage, ...]
    carried: tuple[str, ...]

    @property
    def segments(self) -> int:
        """How many segments there are."""
        return 1 + max((stage.segment for stage in self.stages), default=-1)

    def describe(self) -> str:
        """One line for a report."""
        targets = sum(len(stage.targets) for stage in self.stages)
        text = f"{targets} places in {self.segments} segments and {len(self.stages)} stages"
        wide = max((len(stage.starts) for stage in self.stages), default=0)
        text += f", at most {wide} values between stages"
        return text + (f"; {', '.join(self.carried)} carried along" if self.carried else "")


def cut(program: Program, targets: Sequence[Target], sequential: bool = True) -> Chain:
    """Cut `program` for `targets`; with `sequential`, segments into stages."""
    if not targets:
        return Chain((), ())
    lives = _Lives(program, targets)
    carried = lives.long_lived()
    segments = _segments(lives, carried)
    places: list[tuple[int, int, list[Target]]] = []  # segment, position, targets
    for number, (start, members) in enumerate(segments):
        groups = _stages(lives, start, members) if sequential else [(start, members)]
        places += [(number, position, found) for position, found in groups]
    stages = []
    for i, (number, position, found) in enumerate(places):
        ends = lives.at(places[i + 1][1]) if i + 1 < len(places) else []
        names = tuple(n.name for n in lives.at(position)), tuple(n.name for n in ends)
        stages.append(Stage(number, *names, tuple(found)))
    return Chain(tuple(stages), tuple(n.name for n in carried))


class _Lives:
    """From where to where each value is alive, for values that are computed with weights and that targets need."""

    def __init__(self, program: Program, targets: Sequence[Target]) -> None:
        self.targets = sorted(targets, key=lambda t: (t.at._sort_key, t.value._sort_key))
        data = _computed_with_weights(program)
        needed = _ancestors(t.value for t in targets)
        several = {n for n in data if isinstance(n.meta["val"], tuple | list)}  # its parts are what is kept
        # A matrix that was picked out of a stack is not kept: it would stay as it was when the stack is rounded.
        weights = {n for found in survey(program) if not isinstance(found, Obstacle) for n in found.path}
        skipped = several | weights
        self.nodes = [n for n in program.graph.nodes if n in data and n in needed and n not in skipped]
        at = {t.at for t in targets}
        self.order = program.nodes
        self.index = {n: i for i, n in enumerate(self.order)}
        readers = needed | at
        made = {n: n.all_input_nodes[0] if n.target is operator.getitem else n for n in self.nodes}
        self.first = {n: self.index[made[n] if made[n] in several else n] for n in self.nodes}
        reached = self._reached(readers, weights)
        self.last = {n: max(self.first[n], reached[n]) for n in self.nodes}
        for t in targets:  # looked at, whether anything else reads it or not
            if t.value in self.last:
                self.last[t.value] = max(self.last[t.value], self.index.get(t.at, 0), self.first[t.value] + 1)

    def _reached(self, readers: set[fx.Node], weights: set[fx.Node]) -> dict[fx.Node, int]:
        """Node → the last position that reads it, through weights that are made of it; 0 where none does."""
        table: dict[fx.Node, int] = {}
        for node in reversed(self.order):
            users = [u for u in node.users if u in readers and u in self.index]
            table[node] = max((table[u] if u in weights else self.index[u] for u in users), default=0)
        return table

    def position(self, target: Target) -> int:
        """Where a target stands; 0 for an input of the program."""
        return self.index.get(target.at, 0)

    def ready(self, target: Target) -> int:
        """The first position at which a target's value is there; 0 for an input of the program."""
        return self.first[target.value] + 1 if target.value in self.first else 0

    def at(self, position: int) -> list[fx.Node]:
        """Values that are computed before a position and read at it or behind it."""
        return [n for n in self.nodes if self.first[n] < position <= self.last[n]]

    def long_lived(self) -> list[fx.Node]:
        """Values that live across more than half of the targets, and more than four of them."""
        positions = sorted({self.position(t) for t in self.targets})
        least = max(4, len(positions) // 2)
        return [n for n in self.nodes if sum(self.first[n] < p < self.last[n] for p in positions) > least]


def _segments(lives: _Lives, carried: list[fx.Node]) -> list[tuple[int, list[Target]]]:
    """Start and targets of each segment: cut between targets wherever one value is alive, or none."""
    events: dict[int, int] = {}
    skip = set(carried)
    for n in lives.nodes:
        if n not in skip:
            events[lives.first[n] + 1] = events.get(lives.first[n] + 1, 0) + 1
            events[lives.last[n] + 1] = events.get(lives.last[n] + 1, 0) - 1
    narrow, alive = [], 0
    for position in range(len(lives.index) + 1):
        alive += events.get(position, 0)
        if alive <= 1:
            narrow.append(position)
    segments: list[tuple[int, list[Target]]] = []
    behind = -1
    for target in lives.targets:
        here = lives.position(target)
        between = narrow[bisect_right(narrow, behind) : bisect_right(narrow, here)]
        if between or not segments:
            segments.append((between[0] if between else 0, []))
        segments[-1][1].append(target)
        behind = here
    return segments


def _stages(lives: _Lives, start: int, targets: list[Target]) -> list[tuple[int, list[Target]]]:
    """Start and targets of each stage of a segment: a new one where a value depends on a target of the last one."""
    order = sorted(targets, key=lambda t: max(start, lives.ready(t)))
    upstream = _upstream({t.at for t in targets if t.changes}, lives, start)
    stages: list[tuple[int, list[Target]]] = []
    for target in order:
        settled = {t.at for _, found in stages[-1:] for t in found}
        if not stages:
            stages.append((start, [target]))  # what leads to the value is computed again: cheap, and little is kept
        elif upstream.get(target.value, frozenset()) & settled:
            stages.append((max(start, lives.ready(target)), [target]))
        else:
            stages[-1][1].append(target)
    return stages


def _upstream(marked: set[fx.Node], lives: _Lives, start: int) -> dict[fx.Node, frozenset[fx.Node]]:
    """Which of the marked nodes, all of one segment that begins at `start`, each value there is computed from."""
    table: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in lives.order[start : 1 + max((lives.index[n] for n in marked), default=start)]:
        found = frozenset[fx.Node]().union(*(table.get(source, frozenset()) for source in node.all_input_nodes))
        if node in marked:
            found |= {node}
        if found:
            table[node] = found
    return table


def _computed_with_weights(program: Program) -> set[fx.Node]:
    """Results of products with weights and of lookups, and all that is computed from them."""
    found: set[fx.Node] = {found.node for found in survey(program)}
    for node in program.nodes:
        if any(source in found for source in node.all_input_nodes):
            found.add(node)
    return found


def _ancestors(ends: Iterable[fx.Node]) -> set[fx.Node]:
    reached, waiting = set[fx.Node](), list(ends)
    while waiting:
        node = waiting.pop()
        if node not in reached:
            reached.add(node)
            waiting += node.all_input_nodes
    return reached
