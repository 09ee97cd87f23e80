"""One matrix, rounded by a method, with what it cost."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, TypeAlias

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.linalg import product
from qcompile.numerics.fit import work_dtype
from qcompile.numerics.qtensor import QTensor
from qcompile.rounding.axe import Accumulator, BoundedGrid, Proof, prove, widening
from qcompile.rounding.clip import AwqClip
from qcompile.rounding.factor import Factored, Factors
from qcompile.rounding.figures import Figures, dot, quadratics
from qcompile.rounding.grid import Grid, Stored
from qcompile.rounding.magr import MagR
from qcompile.rounding.method import Method, Sums
from qcompile.rounding.order import column_order
from qcompile.rounding.recursion import recurse
from qcompile.rounding.running import RunningGrid

AnyGrid: TypeAlias = Grid | RunningGrid | BoundedGrid
COUNTED = 256
"""About how many outputs of a large matrix its errors are counted over."""

Groups: TypeAlias = Literal["static", "running"]


@dataclass(frozen=True, eq=False)
class Statistics:
    """What calibration saw of a layer's inputs: X̂ those it will have, X those of the float stream.

    `hessian` X̂X̂ᵀ [in, in], `cross` X̂Xᵀ [in, in], `power` [out], the float outputs' Σ (w_o X)², all three sums or all
    three means over `tokens` tokens; `mean` and `mean_float` [in], the means of X̂ and of X. What was not collected is
    None.
    """

    hessian: Tensor
    cross: Tensor | None = None
    tokens: int = 0
    mean: Tensor | None = None
    mean_float: Tensor | None = None
    power: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Rounded:
    """`result` in the stored layout; `values` [out, in] that it decodes to, in the dtype that was worked in; `proof`
    where there is an accumulator.
    """

    result: QTensor
    values: Tensor
    figures: Figures
    proof: Proof | None = None


def round_matrix(
    weight: Tensor,
    stored: Stored,
    statistics: Statistics,
    method: Method,
    *,
    groups: Groups = "static",
    shrink: MagR | None = None,
    clip: AwqClip | None = None,
    accumulator: Accumulator | None = None,
    safe: bool = True,
    outer: tuple[Tensor, ...] = (),
    factors: Factors | None = None,
) -> Rounded:
    """Round `weight` [out, in] by `method`, in float32, or float64 where the weight is.

    `groups`: parameters of all groups are chosen from the weight (`static`), or each when its turn comes (`running`).
    `shrink`: the weight is first replaced by one with smaller peaks. `clip`: static parameters come from a searched
    range. `accumulator`: codes stay within its bound, those of rounding to nearest as well, and the proof is returned.
    `outer` as in `choose_qparams`. `factors`: give the same to all matrices that read the same inputs.

    `safe`: where the error is above that of rounding to nearest, that result is kept, and the figures say so; the error
    is ΔW's on X̂, and WX - ŴX̂ for a method that follows the float stream and has its cross terms. Where no input ever
    came in, the result is that of rounding to nearest. Errors are counted over about `COUNTED` outputs, evenly spread,
    and over all of them where that leaves a doubt. Raises QCompileError where statistics do not fit the weight or
    the method, where options do not fit each other, where something holds nan, or where H has no factorisation.
    """
    work = work_dtype(weight)
    sums = replace(_sums(weight, stored, statistics, work), factors=factors)
    job = _Job(stored, sums, method, groups, shrink, clip, accumulator, outer)
    job.check()
    columns = weight.to(work).t().contiguous()
    plain = Grid.fit(weight.to(work), stored, outer)
    found = job.solved(columns, plain)
    costs = job.costs(columns, plain, found, statistics.power, max(1, columns.shape[1] // COUNTED))
    if found is not None and safe and costs.step > 1 and not costs.clearly_less:
        costs = job.costs(columns, plain, found, statistics.power, 1)
    fell_back: str | None = None
    if found is None:
        fell_back = "no input came in"
    elif safe and not costs.deciding <= costs.deciding_nearest:
        fell_back = f"error {costs.deciding:.4g} above {costs.deciding_nearest:.4g} of rounding to nearest"
    if found is None or fell_back is not None:
        found, costs = job.nearest(columns, plain), replace(costs, found=costs.nearest)
    figures = _figures(job, found.factored, statistics, costs, fell_back)
    result = found.grid.finish(found.values.t())
    proof = None if accumulator is None else prove(stored.matrix(result.codes), accumulator)
    if proof is not None and not proof.holds:
        raise QCompileError(f"{stored.spec}: codes can overflow {accumulator}: {proof}; report this")
    return Rounded(result, found.values.t(), figures, proof)


@dataclass(frozen=True, eq=False)
class _Solution:
    """Values [in, out] and what rounded them."""

    values: Tensor
    grid: AnyGrid
    factored: Factored | None


@dataclass(frozen=True, eq=False)
class _Job:
    """One matrix to round and how; see `round_matrix`."""

    stored: Stored
    sums: Sums
    method: Method
    groups: Groups
    shrink: MagR | None
    clip: AwqClip | None
    accumulator: Accumulator | None
    outer: tuple[Tensor, ...]

    def check(self) -> None:
        """QCompileError where options exclude each other."""
        if self.groups == "running" and (self.clip is not None or self.accumulator is not None):
            other = self.clip or self.accumulator
            raise QCompileError(f"running groups and {other} do not go together; use static groups")

    def costs(self, columns: Tensor, grid: Grid, found: _Solution | None, power: Tensor | None, step: int) -> _Costs:
        """What rounding to nearest and what was found cost over every `step`-th output; no other is rounded for it."""
        few = columns[:, ::step].contiguous()
        if self.accumulator is None:
            nearest = grid.outputs(step).round(few, slice(None))
        else:
            nearest = self.nearest(columns, grid).values[:, ::step]
        values = [nearest] if found is None else [nearest, found.values[:, ::step]]
        return _Costs.of(few, self.sums, values, None if power is None else power[::step], self.method, step)

    def nearest(self, columns: Tensor, grid: Grid) -> _Solution:
        """Rounding to nearest on the weight's own `grid`; within the accumulator's bound where there is one."""
        if self.accumulator is None:
            return _Solution(grid.round(columns, slice(None)), grid, None)
        values = torch.empty_like(columns)
        bounded = self._bounded(columns, columns, grid, self.accumulator)
        for j, row in enumerate(columns):
            bounded.column(row, j, values[j])
        return _Solution(values, grid, None)

    def solved(self, columns: Tensor, plain: Grid) -> _Solution | None:
        """By the method, in the order that it asks for; None where no input came in. `plain`: the weight's own grid."""
        if bool(self.sums.dead.all()):
            return None
        whole = columns
        if self.shrink is not None:
            columns = self.shrink.shrunk(columns, self.sums.hessian, self.stored.scales[1])
        # Weights of dead inputs become 0, which leaves finer steps to those beside them.
        living = self.sums.alive(columns)
        grid = self._grid(living, plain if living is whole else None)
        order = column_order(self.method.order, self.sums.diagonal, grid.group_of)
        if order is None:
            problem = self.method.problem(columns, self.sums)
            values = recurse(problem.base, problem.anchor, problem.feedback, grid)
        else:
            problem = self.method.problem(columns[order], self.sums.ordered(order))
            found = recurse(problem.base, problem.anchor, problem.feedback, grid.permuted(order))
            values = torch.empty_like(found).index_copy_(0, order, found)
        return _Solution(values, grid, problem.factored)

    def _grid(self, columns: Tensor, known: Grid | None) -> AnyGrid:
        """What to round `columns` with; `known`: the grid that their own range gives, where it is known."""
        if self.groups == "running":
            return RunningGrid.fit(columns.t(), self.stored, self.outer)
        seen = columns
        if self.clip is not None:
            seen, known = self.clip.ranges(columns, self.sums.hessian, self.stored, self.outer), None
        grid = known or Grid.fit(seen.t(), self.stored, self.outer)
        return grid if self.accumulator is None else self._bounded(columns, seen, grid, self.accumulator)

    def _bounded(self, columns: Tensor, seen: Tensor, grid: Grid, accumulator: Accumulator) -> BoundedGrid:
        """`grid`, which was fitted to `seen`, within the accumulator's bound."""
        if accumulator.widen:
            wider = widening(columns, grid, accumulator)
            if bool((wider > 1).any()):
                grid = Grid.fit((seen * wider[grid.group_of]).t(), self.stored, self.outer)
        return BoundedGrid(grid, accumulator, columns)


def _figures(
    job: _Job, factored: Factored | None, statistics: Statistics, costs: _Costs, fell_back: str | None
) -> Figures:
    before, after = costs.nearest, costs.found
    crossed = job.sums.cross is not None
    options = [job.method, *(option for option in (job.shrink, job.clip, job.accumulator) if option is not None)]
    return Figures(
        method=" + ".join(map(str, options)),
        tokens=statistics.tokens,
        dead=int(job.sums.dead.sum()),
        damping=None if factored is None else factored.damping,
        tried=() if factored is None else factored.tried,
        loss=after[0],
        rtn_loss=before[0],
        gap=after[1] if crossed else None,
        rtn_gap=before[1] if crossed else None,
        error=costs.error(after[1]),
        rtn_error=costs.error(before[1]),
        fell_back=fell_back,
    )


def _sums(weight: Tensor, stored: Stored, statistics: Statistics, work: torch.dtype) -> Sums:
    count = stored.in_features
    if weight.shape != (stored.out_features, count):
        shape = list(stored.shape)
        raise QCompileError(f"weight of shape {list(weight.shape)} is not the [out, in] of {shape}; transpose it")
    for name in ("hessian", "cross"):
        found: Tensor | None = getattr(statistics, name)
        if found is not None and found.shape != (count, count):
            raise QCompileError(f"{name} of shape {list(found.shape)} for {count} inputs; it must be [in, in]")
    cross = None if statistics.cross is None else statistics.cross.to(work)
    return Sums(statistics.hessian.to(work), cross)


@dataclass(frozen=True)
class _Costs:
    """What rounding to nearest and what was found cost over every `step`-th output, for rows of a weight are problems
    of their own: the loss, and the gap (the loss again where no cross terms are known); see `Figures`.
    """

    nearest: tuple[float, float]
    found: tuple[float, float]
    energy: float  # tr(W H Wᵀ)
    unrounded: float | None  # ‖WX - WX̂‖²
    power: float | None  # ‖WX‖²
    by_gap: bool
    step: int

    @classmethod
    def of(
        cls, columns: Tensor, sums: Sums, values: list[Tensor], power: Tensor | None, method: Method, step: int
    ) -> _Costs:
        """Of one or two matrices of values against `columns` [in, out]; the last is what was found."""
        wrong = [v - columns for v in values]
        energy, *losses = quadratics([columns, *wrong], sums.hessian)
        unit, gaps, unrounded, total = energy or 1.0, losses, None, None
        if sums.cross is not None:
            pull = product(sums.hessian - sums.cross, columns)  # (H - G) Wᵀ
            gaps = [loss + 2 * dot(w, pull) for loss, w in zip(losses, wrong, strict=True)]
            if power is not None:
                total = float(power.sum(dtype=torch.float64))
                unrounded = total - energy + 2 * dot(columns, pull)
        both = [(loss / unit, gap / unit) for loss, gap in zip(losses, gaps, strict=True)]
        by_gap = method.follows_float and sums.cross is not None
        return cls(both[0], both[-1], energy, unrounded, total, by_gap, step)

    @property
    def deciding(self) -> float:
        """The error that what was found is judged by."""
        return self.found[self.by_gap]

    @property
    def deciding_nearest(self) -> float:
        """The same of rounding to nearest."""
        return self.nearest[self.by_gap]

    @property
    def clearly_less(self) -> bool:
        """Whether an error that was counted over some outputs is less over all of them beyond doubt."""
        return self.deciding < self.deciding_nearest - 0.1 * abs(self.deciding_nearest)

    def error(self, gap: float) -> float | None:
        """‖WX - ŴX̂‖² / ‖WX‖² for a gap."""
        if self.unrounded is None or not self.power:
            return None
        return (self.unrounded + gap * self.energy) / self.power
