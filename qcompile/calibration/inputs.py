"""What the products of one weight read: one Gram matrix, or one for each expert.

w[index] · x, grouped_mm(x, w, offsets), w[e] · x_e unrolled, every expert at once        rows of x ⟶ rows of expert e
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from qcompile.calibration.processes import Processes
from qcompile.calibration.statistics import Gram, Seen, check_finite
from qcompile.data.padding import Padding
from qcompile.passes.quantize.dealing import Dealing


@dataclass(frozen=True)
class InputWant:
    """H of one input, and G where both programs are looked at; see `Gram`.

    Args:
        where: the place, for messages.
        x_hat: the value in the program being quantized (in the float one where `propagate` is float).
        x: the value in the float program, for G and the mean; None where it is not wanted.
        axis, axis_float: of features.
        experts: how rows are dealt to experts, with the value that decides it; None for a product that sees all.
        experts_float: the same in the float program, where `x` is wanted.
        of_float: `x_hat` is a value of the float program.
        in_integers: sums are of 8-bit integers; see `integers`.
        padding, padding_float: what leaves padding out of `x_hat` and of `x`.
    """

    where: str = field(compare=False)
    x_hat: fx.Node
    x: fx.Node | None
    axis: int
    axis_float: int
    experts: Dealing | None
    of_float: bool
    padding: Padding = field(compare=False)
    padding_float: Padding = field(compare=False)
    experts_float: Dealing | None = None
    in_integers: bool = False

    @property
    def quantized(self) -> tuple[str, ...]:
        return () if self.of_float else _read(self.x_hat, self.experts)

    @property
    def float(self) -> tuple[str, ...]:
        given = () if self.x is None else _read(self.x, self.experts_float)
        return (*_read(self.x_hat, self.experts), *given) if self.of_float else given

    def make(self) -> InputGram:
        return InputGram(self)


class InputGram:
    """Gram matrices by expert; expert 0 alone where there are none."""

    def __init__(self, want: InputWant) -> None:
        self.want = want
        self.of: dict[int, Gram] = {}

    def see(self, seen: Seen) -> None:
        """Take in a batch."""
        want = self.want
        values: Mapping[str, Any] = seen.float if want.of_float else seen.quantized
        if want.experts is None:
            rows = _rows(want.padding, want.x_hat, values, want.axis, seen.mask)
            check_finite(rows, want.where, seen.samples, seen.mask)
            other = None
            if want.x is not None:
                other = _rows(want.padding_float, want.x, seen.float, want.axis_float, seen.mask)
                check_finite(other, f"{want.where} in the float model", seen.samples, seen.mask)
            self._gram(0).add(rows, other)
            return
        self._see_experts(want.experts, values, seen)

    def _see_experts(self, experts: Dealing, values: Mapping[str, Any], seen: Seen) -> None:
        want = self.want
        x, decider = values[want.x_hat.name], _decider(experts, values)
        dealt, others = experts.rows(x, decider), dict[int, Tensor]()
        if want.x is not None and want.experts_float is not None:
            # A token that the float router sends elsewhere has no input of this expert to follow; it follows its own.
            float_decider = _decider(want.experts_float, seen.float)
            others = experts.rows(experts.lined_up(x, decider, seen.float[want.x.name], float_decider), decider)
        for expert, rows in dealt.items():
            check_finite(rows, f"{want.where}, expert {expert}", seen.samples, in_order=False)
            other = others.get(expert)
            if other is not None:
                place = f"{want.where}, expert {expert}, in the float model"
                check_finite(other, place, seen.samples, in_order=False)
            if len(rows):
                self._gram(expert).add(rows, other)

    def add_up(self, processes: Processes) -> None:
        """Add up over processes; an expert that this one did not see counts as zeros. Then the sums are as final."""
        if processes.size > 1:
            self._add_up(processes)
        for gram in self.of.values():
            gram.settle(self.want.x_hat.meta["val"].dtype)

    def _add_up(self, processes: Processes) -> None:
        experts = processes.union(sorted(self.of))
        width = processes.largest(max((g.width for g in self.of.values()), default=0))
        for expert in experts:
            gram = self._gram(expert)
            gram.prepare(width, self.want.x is not None)
            processes.add_up(gram.parts())
            gram.tokens = processes.number(gram.tokens)

    def _gram(self, expert: int) -> Gram:
        return self.of.setdefault(expert, Gram(self.want.in_integers))


def _read(value: fx.Node, experts: Dealing | None) -> tuple[str, ...]:
    return (value.name,) if experts is None or experts.decider is None else (value.name, experts.decider)


def _decider(experts: Dealing, values: Mapping[str, Any]) -> Tensor | None:
    found: Tensor | None = None if experts.decider is None else values[experts.decider]
    return found


def _rows(padding: Padding, node: fx.Node, values: Mapping[str, Any], axis: int, mask: Tensor | None) -> Tensor:
    """The tokens' rows ``[tokens, features]`` of a value."""
    moved = padding.tokens_of(node, values[node.name], mask).movedim(axis, -1)
    return moved.reshape(-1, moved.shape[-1])


def together(grams: list[Gram]) -> Gram:
    """The sums of several, of one width; G only where all have it."""
    if len(grams) == 1:
        return grams[0]  # and no copy of it
    total = Gram()
    crossed = all(g.cross is not None for g in grams if g.hessian is not None)  # who saw nothing has nothing to add
    for gram in grams:
        if gram.hessian is None:
            continue
        total.prepare(gram.width, crossed, gram.hessian.device)
        total.tokens += gram.tokens
        for mine, other in zip(total.parts(), gram.parts() if crossed else gram.parts()[:2], strict=True):
            mine += other
    return total
