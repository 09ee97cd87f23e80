"""Choose an order of channels from a score, and apply it to every space that admits one."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.errors import QCompileError, RecipeError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.passes.permute.kinds import Kind, kind_of
from qcompile.spaces import ChannelSpaces, Level, Placement, Space
from qcompile.spaces.apply import Edits
from qcompile.spaces.layout import Layout
from qcompile.spaces.show import account, describe, left_alone

Arrangement = Literal["sorted", "even"]
Score = Callable[[Placement], Tensor]
"""Sink ⟶ a number ≥ 0 for each channel of its space, float64 [width]."""


@dataclass(frozen=True)
class Arrange:
    """How to order channels; see the passes for what the fields mean. Raises RecipeError where they do not agree."""

    kinds: tuple[Kind, ...]
    arrange: Arrangement
    group: int | None
    descending: bool

    def __post_init__(self) -> None:
        if (self.arrange == "even") != (self.group is not None):
            raise RecipeError(
                f"arrange={self.arrange} with group={self.group}: give group with arrange=even, and only there"
            )
        if self.group is not None and self.group < 1:
            raise RecipeError(f"group={self.group} is no number of channels; give 1 or more")

    def order(self, scores: Tensor) -> Tensor:
        """The channel that stands in each place, int64 [width]."""
        order = scores.argsort(descending=self.descending, stable=True)
        if self.group is None:
            return order
        rows = order.view(self.group, -1).clone()  # one channel for each group in every row, dealt there and back
        rows[1::2] = rows[1::2].flip(-1)
        return rows.T.reshape(-1)

    def unfit(self, space: Space) -> str | None:
        """Why a space is left in its order."""
        if not space.sinks:
            return "no product reads it, so its order is nothing to a weight's groups"
        if self.group is not None and space.width % self.group:
            return f"groups of {self.group} do not divide its {space.width} channels"
        return None


def arrange(
    spaces: ChannelSpaces, how: Arrange, score: Score, combine: Callable[[list[Tensor]], Tensor], report: Report
) -> None:
    """Order every space of the wanted kinds by `combine` of its sinks' scores; what keeps its order is reported."""
    edits = Edits(spaces, report)
    reached: set[fx.Node] = set()
    fates: dict[Space, str] = {}
    for space in spaces[Level.PERMUTATION]:
        reached |= {p.node for p in space.sinks}
        if (kind := kind_of(space)) not in how.kinds:
            fates[space] = left_alone(f"{kind}=false")
            continue
        if not _made_by_products(space):
            fates[space] = left_alone("no matrix or table makes it")
            continue
        if (reason := how.unfit(space)) is not None:
            report.skip(space.name, reason)
            fates[space] = left_alone(reason)
            continue
        scores = combine([score(sink) for sink in space.sinks])
        if not bool(scores.isfinite().all()):
            raise QCompileError(f"{space.name}: a channel's score is not finite; look for nan in its weights or data")
        order = how.order(scores)
        moved = int((order != torch.arange(space.width)).sum())
        edits.permute(space, order)
        fates[space] = f"{kind}: {how.arrange} by the score of {len(space.sinks)} sinks"
        report.rewrote(space.name, f"{kind}: {moved} of {space.width} channels moved, {len(space.sinks)} sinks")
    _left_alone(spaces, reached, report)
    report.spaces = account(spaces, describe(spaces), Level.PERMUTATION, fates)
    edits.commit()


def _made_by_products(space: Space) -> bool:
    """Whether matrices and tables make it; vectors alone make such as the frequencies of a rotary embedding."""
    return any(p.use.weight is not None and p.use.weight.meta["val"].ndim > 1 for p in space.sources)


def _left_alone(spaces: ChannelSpaces, reached: set[fx.Node], report: Report) -> None:
    """Products whose input keeps its order, and the operator that forbids another."""
    for product in find_contractions(spaces.program):
        if product.node in reached:
            continue
        behind, ends = _behind(spaces, product.input)
        limits = [limit for layout in behind for limit in spaces.all_limits(Level.PERMUTATION, layout.ids)]
        limits = [limit for limit in limits if limit.node in ends] or limits  # what stands between comes first
        if limits:
            report.skip(product.node, "; ".join(dict.fromkeys(map(str, limits[:3]))))
        elif behind:
            report.skip(product.node, "each channel that it reads moves with others of its own")
        else:
            report.skip(product.node, "reads no channels that a weight makes")


def _behind(spaces: ChannelSpaces, node: fx.Node) -> tuple[list[Layout], set[fx.Node]]:
    """The channels that a node holds, or those nearest to it among what it is computed from; what ends them."""
    found: list[Layout] = []
    ends: set[fx.Node] = set()
    seen, waiting = {node}, [(node, node)]
    while waiting:
        here, reader = waiting.pop()
        layout = spaces.layouts.get(here)
        if isinstance(layout, Layout) and layout.has_wires:
            found.append(layout)
            ends |= {reader} - {here}
            continue
        waiting += [(n, here) for n in here.all_input_nodes if n not in seen]
        seen |= set(here.all_input_nodes)
    return found, ends


def channels(values: Tensor, sink: Placement, copies: Literal["max", "sum"]) -> Tensor:
    """Values along a sink's axis ⟶ one for each channel of the space, its copies combined."""
    placed = values[torch.from_numpy(sink.positions)].double()
    return placed.amax(0) if copies == "max" else placed.sum(0)


def weight_columns(program: Program, sink: Placement) -> Tensor:
    """A sink's weight as ``[everything else, input features]``."""
    assert sink.use.weight is not None
    weight = program.weight(sink.use.weight)
    weight = weight if sink.use.view is None else weight.reshape(sink.use.view)
    return weight.movedim(sink.use.axis, -1).flatten(0, -2)
