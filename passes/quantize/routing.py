"""How many calibration tokens each expert sees, counted from the graph's own routing while the data runs through it.

What decides is read off the graph, as its experts are written:

    bmm(w[index], x)                  how often index names each expert
    grouped_mm(x, w, offsets)         the differences of the offsets
    linear(part_e, w[e]), unrolled    the rows of part_e
    bmm(w, x), every expert at once   the rows of x[e] that are not all zero

A token that goes to k experts is seen by each of them. A pass that looks at calibration data makes one `RoutingCounts`,
shows it every value, and lets it tell its report.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, find_contractions
from qcompile.ir.moves import axis_back, rank
from qcompile.ir.program import Program
from qcompile.pass_base import Report

aten = torch.ops.aten

FEWEST_TOKENS = 16
"""An expert that saw fewer tokens has figures that say little of it."""
LEAST_SHARE = 0.1
"""So has one that saw less than this part of what each would see were they dealt out evenly."""

Count = Callable[[Tensor], Tensor]
"""A value on one batch → tokens of each expert, int64 ``[experts]``."""


@dataclass(frozen=True)
class Route:
    """A value that says which expert sees what."""

    where: str  # the module
    experts: int
    source: str  # name of the node
    count: Count
    decider: str  # name of the node that deals tokens out, or of the weight whose experts all run
    every: bool = False  # all experts run, on parts or on masked tokens: told only where their tokens differ


class RoutingCounts:
    """Tokens that each expert of each layer has seen so far."""

    def __init__(self, program: Program) -> None:
        self._routes: dict[str, list[Route]] = {}
        self._seen: dict[tuple[str, str], Tensor] = {}  # source, module
        self._every: dict[str, bool] = {}
        routes, self._unread = find_routes(program)
        for route in routes:
            self._routes.setdefault(route.source, []).append(route)
            self._seen[route.source, route.where] = torch.zeros(route.experts, dtype=torch.int64)
            self._every[route.where] = route.every

    @property
    def sources(self) -> list[str]:
        """Names of the nodes whose values decide."""
        return list(self._routes)

    def observe(self, name: str, value: Any) -> None:
        """Take in the value of a node of the program, or of a copy of it, by its name."""
        for route in self._routes.get(name, ()):
            self._seen[name, route.where] += route.count(value).cpu()

    def add_up(self, names: Sequence[str], sum_over: Callable[[Sequence[Tensor]], None]) -> None:
        """Let every count of these sources be what `sum_over` makes of it, in place."""
        sum_over([seen for (source, _), seen in self._seen.items() if source in names])

    def counted(self, names: Sequence[str]) -> list[tuple[str, str, list[int]]]:
        """Source, module and tokens of each expert, for these sources: plain data, which `restore` takes."""
        return [(source, where, seen.tolist()) for (source, where), seen in self._seen.items() if source in names]

    def restore(self, counted: Sequence[tuple[str, str, list[int]]]) -> None:
        """Set counts to what `counted` gave."""
        for source, where, tokens in counted:
            self._seen[source, where] = torch.tensor(tokens, dtype=torch.int64)

    @property
    def tokens(self) -> dict[str, list[int]]:
        """Module of the experts → tokens of each; experts that all run, and on as many tokens, are left out."""
        total: dict[str, Tensor] = {}
        for (_, where), seen in self._seen.items():
            total[where] = total.get(where, 0) + seen
        return {
            where: [int(n) for n in seen]
            for where, seen in total.items()
            if not self._every[where] or bool((seen != seen[0]).any())
        }

    def tell(self, report: Report) -> None:
        """Put the counts of each layer in the report, and a note for each that has experts with too few."""
        for node, reason in self._unread:
            report.skip(node, reason)
        for where, tokens in self.tokens.items():
            even = sum(tokens) / len(tokens)
            few = {i: n for i, n in enumerate(tokens) if n < FEWEST_TOKENS or n < LEAST_SHARE * even}
            unseen = sum(n == 0 for n in tokens)
            middle = float(torch.tensor(tokens, dtype=torch.float64).quantile(0.5))
            report.measure(
                where,
                {
                    "experts": len(tokens),
                    "tokens_min": min(tokens),
                    "tokens_median": middle,
                    "tokens_max": max(tokens),
                    "unseen_experts": unseen,
                    "rarely_seen_experts": len(few),
                },
            )
            if few:
                listed = ", ".join(f"{i} ({n})" for i, n in few.items())
                report.note(
                    f"warning: {where}: {len(few)} of {len(tokens)} experts saw fewer than {FEWEST_TOKENS} calibration "
                    f"tokens or under {LEAST_SHARE:.0%} of an even share ({even:.0f}), {unseen} of them none; "
                    f"expert (tokens): {listed}; give more calibration data"
                )


def find_routes(program: Program) -> tuple[list[Route], list[tuple[fx.Node, str]]]:
    """Where the program deals tokens out to experts, each decision once; and products where that cannot be read."""
    routes: list[Route] = []
    unread: list[tuple[fx.Node, str]] = []
    watched: set[str] = set()
    taken: dict[str, str] = {}
    for c in find_contractions(program):
        if c.experts is None:
            continue
        if (route := _route(program, c)) is None:
            unread.append((c.node, f"which of its experts sees which token cannot be read off {c.op}"))
            continue
        again = not route.every and route.source in watched  # the down projection goes where the up projection went
        if not again and taken.setdefault(route.where, route.decider) == route.decider:
            routes.append(route)
            watched.add(route.source)
    return routes, unread


def _route(program: Program, c: Contraction) -> Route | None:
    experts = c.weight.meta["val"].shape[c.experts]
    where = program.key(c.weight).rpartition(".")[0] or program.module_of(c.node) or program.key(c.weight)
    for position, move in enumerate(c.path):
        index, number = chosen(program, c, position, move)
        if index is not None:
            return Route(where, experts, index.name, partial(_of_index, experts=experts), index.name)
        if number is not None:
            count = partial(_of_part, features=c.input_axis, number=number % experts, experts=experts)
            return Route(where, experts, c.input.name, count, c.weight.name, every=True)
    if "grouped_mm" in c.op and isinstance(offsets := program.arg(c.node, "offs"), fx.Node):
        return Route(where, experts, offsets.name, _of_offsets, offsets.name)
    if c.node.target in (aten.bmm.default, aten.baddbmm.default):
        return Route(where, experts, c.input.name, partial(_of_every, features=c.input_axis), c.weight.name, every=True)
    return None


def chosen(program: Program, c: Contraction, position: int, move: fx.Node) -> tuple[fx.Node | None, int | None]:
    """The index, a node or a number, that a move on the path takes along the experts; neither where it takes none."""
    index: Any = None
    if move.target is aten.index.Tensor:
        given = [(p, n) for p, n in enumerate(program.arg(move, "indices")) if n is not None]
        axis, index = given[0] if len(given) == 1 else (0, None)
    elif move.target in (aten.index_select.default, aten.select.int):
        axis, index = program.arg(move, "dim"), program.arg(move, "index")
    elif move.target is aten.unbind.int and position + 1 < len(c.path):
        axis, index = program.arg(move, "dim"), c.path[position + 1].args[1]
    if index is None:
        return None, None
    read = c.path[position - 1] if position else c.weight
    place: int | None = axis % rank(read)
    for earlier in reversed(c.path[:position]):
        place = axis_back(program, earlier, place) if place is not None else None
    if place != c.experts:
        return None, None
    return (None, index) if isinstance(index, int) else (index, None)


def _of_index(index: Tensor, experts: int) -> Tensor:
    return torch.bincount(index.reshape(-1).remainder(experts).to(torch.int64), minlength=experts)


def _of_offsets(offsets: Tensor) -> Tensor:
    return torch.diff(offsets.to(torch.int64), prepend=offsets.new_zeros(1, dtype=torch.int64))


def _of_part(value: Tensor, features: int, number: int, experts: int) -> Tensor:
    counts = torch.zeros(experts, dtype=torch.int64, device=value.device)
    counts[number] = (value != 0).any(features).sum()
    return counts


def _of_every(value: Tensor, features: int) -> Tensor:
    return (value != 0).any(features).flatten(1).sum(1)
