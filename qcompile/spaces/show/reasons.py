"""What keeps wires from admitting more: the operator, why, and the pass that changes it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import fx

from qcompile.ir.contractions import short_name
from qcompile.spaces.analysis import ChannelSpaces
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout
from qcompile.spaces.wires import Level

aten = torch.ops.aten
_NORMS = (aten.rms_norm.default, aten.layer_norm.default)
_SPELLED = (aten.pow.Tensor_Scalar, aten.rsqrt.default, aten.square.default, aten.mean.dim)

SPLITS = (
    "multiplies each channel by another number",
    "each part is mixed over tokens by weights of its own",
    "normalises by groups",
)
"""Reasons for which wires are told apart without being limited: where each is left alone, nothing mixes them."""

LIFTS = ("fold-norm-affine", "center-norm", "raise-norms", "untie-embeddings")
"""The passes that take a reason away."""


@dataclass(frozen=True)
class Reason:
    """Operators that forbid something, all alike but for their layer."""

    levels: tuple[Level, ...]  # what they forbid
    operator: str
    modules: tuple[str, ...]
    nodes: tuple[str, ...]
    why: str
    lift: str | None  # a pass after which it is no longer so

    def __str__(self) -> str:
        known = self.why.split()[0] == self.operator
        return self.why if known else f"{self.operator}: {self.why}"


class Reasons:
    """Everything that restricts, looked up by wires. One sweep over the restrictions serves all questions: classes that
    the same operators restrict have the same number, and few numbers there are.
    """

    def __init__(self, spaces: ChannelSpaces) -> None:
        self.spaces = spaces
        self.roots = {level: spaces.wires.roots(level) for level in Level}
        made = {level: self._sets(level) for level in Level}
        self.numbers = {level: numbers for level, (numbers, _) in made.items()}  # of each class, its set of events
        self.sets = {level: sets for level, (_, sets) in made.items()}

    def _sets(self, level: Level) -> tuple[Ids, list[list[int]]]:
        """For each class the number of its set of events, and the sets; number 0 is the empty one."""
        wires, root = self.spaces.wires, self.roots[level]
        found = [(root[ids], event) for ids, event in wires.restricted(level)]
        if level in (Level.PERMUTATION, Level.ORTHOGONAL):
            for event, limit in enumerate(wires.events):
                if limit.reason in SPLITS:
                    found += [(root[ids], event) for ids in self._near(limit.node)]
        numbers = np.zeros(wires.count, np.int64)
        sets: list[list[int]] = [[]]
        for classes, event in found:
            have = numbers[classes]
            if (have == have[:1]).all():  # nearly always
                old, inverse = have[:1], np.zeros(len(have), np.int64)
            else:
                old, inverse = np.unique(have, return_inverse=True)
            for number in old:
                sets.append([*sets[number], event])
            numbers[classes] = (len(sets) - len(old) + np.arange(len(old)))[inverse]
        return numbers, sets

    def _near(self, node: fx.Node) -> list[Ids]:
        paired = {"query", "key"} if node.target is aten.scaled_dot_product_attention.default else set()
        elsewhere = [self.spaces.program.arg(node, name) for name in paired]
        layouts = [self.spaces.layouts.get(n) for n in (node, *node.all_input_nodes) if n not in elsewhere]
        return [layout.ids[layout.ids >= 0] for layout in layouts if isinstance(layout, Layout) and layout.has_wires]

    def events(self, level: Level, ids: Ids) -> list[int]:
        """The events that restrict these wires at a level, in program order."""
        present = np.unique(self.numbers[level][self.roots[level][ids]])
        return sorted({event for number in present for event in self.sets[level][number]})

    def of(self, ids: Ids, levels: list[Level]) -> tuple[Reason, ...]:
        """Reasons against `levels`, those that a pass lifts first, then the shortest."""
        program = self.spaces.program
        found: dict[tuple[str, str, str | None], dict[Level, list[fx.Node]]] = {}
        for level in levels:
            for event in self.events(level, ids):
                limit = self.spaces.wires.events[event]
                key = (_operator(limit.node), limit.reason, _lift(limit.node, limit.reason))
                found.setdefault(key, {}).setdefault(level, []).append(limit.node)
        reasons = []
        for (operator, why, lift), places in found.items():
            nodes = list(dict.fromkeys(n for at in places.values() for n in at))
            modules = tuple(dict.fromkeys(m for n in nodes if (m := program.module_of(n))))
            names = tuple(n.name for n in nodes)
            reasons.append(Reason(tuple(sorted(places)), operator, modules, names, why, lift))
        return tuple(sorted(reasons, key=lambda r: (r.lift is None, len(str(r)))))


def _operator(node: fx.Node) -> str:
    return short_name(node) if node.op == "call_function" else "the program" if node.op == "output" else "an input"


def _lift(node: fx.Node, reason: str) -> str | None:
    """The pass that takes a reason away."""
    if node.target in _NORMS and reason.startswith("its gain"):
        return "fold-norm-affine"
    if reason.startswith("subtracts the mean"):
        return "center-norm"
    if node.target in _SPELLED:
        return "raise-norms"
    return "untie-embeddings" if reason.startswith("reads the weight") else None
