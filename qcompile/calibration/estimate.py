"""What a run of the engine will take, before it starts: memory by part, and seconds, from the shapes in the graph.

Bytes are those of what is alive at once; operations and traffic are turned into seconds by what this machine was seen
to do in a fraction of a second. Good to about a third for memory and a factor of two for time.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from qcompile.calibration.chain import Stage
from qcompile.calibration.costs import Sizes, SliceCost, slice_cost
from qcompile.calibration.inputs import InputWant
from qcompile.calibration.machine import Speed, free_memory, resident, speed
from qcompile.calibration.statistics import Want
from qcompile.errors import QCompileError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.numerics.criterion import HalfQuadratic, LeastError
from qcompile.numerics.spec import QuantSpec
from qcompile.passes.quantize.dealing import dealing
from qcompile.passes.quantize.sites import weight_qdq

if TYPE_CHECKING:
    from rich.table import Table

    from qcompile.calibration.engine import Engine

_SQUARES, _SQUARES_CROSS = 4, 5
"""Matrices [in, in] in float32 that rounding holds at once beside the sums; with cross terms."""
_WEIGHTS = 5
"""Matrices [out, in] in float32 that rounding holds at once."""
_SEARCHED, _CHOSEN = 2500, 300
"""Bytes moved for each weight to choose its scale and store it: where scales are searched for (mse), and where not."""
_COLUMN = 20e-6
"""Seconds that rounding a column takes beside its arithmetic."""

Shapes = tuple[tuple[str, tuple[int, ...]], ...]


@dataclass(frozen=True)
class Estimate:
    """What a run will take.

    Args:
        bytes: part → its most bytes. `process`: what is held already; `codes`: rounded weights kept in memory;
            `values`: between stages, of all batches and both programs; `weights`: of the stage with the largest, in the
            dtype they are computed with; `hessians`: sums of the stage with the largest; `running`: one batch inside a
            stage; `solving`: rounding one matrix, beside the sums.
        peak: most bytes at any one time; parts do not all have their most at once. `moment` says when that is.
        spilled: bytes of values that go through files, at most at once.
        seconds: of `collect`, `solve` and `forward`, as the engine measures them.
        stages: seconds of each stage.
        free: bytes that can be taken beside `process`.
    """

    bytes: Mapping[str, int]
    peak: int
    moment: str
    spilled: int
    seconds: Mapping[str, float]
    stages: tuple[float, ...] = field(repr=False)
    free: int

    @property
    def total(self) -> float:
        """Seconds of the whole run."""
        return sum(self.seconds.values())

    def check(self, sequential: bool = True, crossed: bool = False) -> None:
        """QCompileError where it does not fit what is free. `sequential`: whether stages are taken one by one;
        `crossed`: whether cross terms with the float program are collected.
        """
        needed = self.peak - self.bytes.get("process", 0)
        if needed <= self.free:
            return
        ways = ["fewer samples in a batch (calibration.batch)", "shorter ones (calibration.length)"]
        if self.bytes["values"] > self.free / 4:
            ways.insert(0, f"calibration.memory={max(self.free / 4e9, 0.01):.2f}")
        if crossed:
            ways.append("a method without cross terms, such as gptq(target=quantized)")
        if not sequential:
            ways.insert(0, "calibration.true_sequential=true, which holds less")
        raise QCompileError(
            f"calibration needs about {needed / 1e9:.2f} GB ({self.moment}) and {self.free / 1e9:.2f} GB are free; "
            f"take {', or '.join(ways)}, or a machine with more memory"
        )

    def figures(self) -> dict[str, float]:
        """To stand in a report beside what was measured."""
        return {"estimated_seconds": self.total, "estimated_peak_bytes": self.peak}

    @property
    def summary(self) -> str:
        """Memory and time in a few words."""
        return f"about {self.peak / 1e9:.2f} GB at most ({self.moment}) and {_time(self.total)}"

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        return {
            "bytes": dict(self.bytes),
            "peak_bytes": self.peak,
            "moment": self.moment,
            "spilled_bytes": self.spilled,
            "seconds": dict(self.seconds),
            "total_seconds": self.total,
            "free_bytes": self.free,
        }

    def table(self) -> Table:
        """Parts and phases, for a terminal."""
        from rich.table import Table

        table = Table()
        for heading in ("part", "most, GB", "phase", "about"):
            table.add_column(heading, justify="right" if heading in ("most, GB", "about") else "left")
        parts = [(name, f"{size / 1e9:.2f}") for name, size in self.bytes.items()]
        parts += [("values in files", f"{self.spilled / 1e9:.2f}")] if self.spilled else []
        phases = [(name, _time(seconds)) for name, seconds in self.seconds.items()]
        for i in range(max(len(parts), len(phases))):
            table.add_row(*(parts[i] if i < len(parts) else ("", "")), *(phases[i] if i < len(phases) else ("", "")))
        return table


def estimate(engine: Engine, pace: Speed | None = None, free: int | None = None) -> Estimate:
    """What `engine` will take. Nothing is run, and no weight is read.

    Args:
        pace: of this machine; measured where None.
        free: bytes that can be taken; asked of the system where None.
    """
    device = engine.setup.settings.device
    pace = pace or speed(torch.get_num_threads(), device)
    free = free_memory(device) if free is None else free
    return _Estimator(engine, pace).run(free)


@dataclass(frozen=True)
class _Matrix:
    """Weights to round: `count` of [out, in], one at a time."""

    key: str
    rows: int
    columns: int
    count: int
    stored: int  # bytes of codes and scales
    searched: bool
    crossed: bool

    @property
    def bytes(self) -> int:
        """Beside the sums."""
        squares = _SQUARES_CROSS if self.crossed else _SQUARES
        return 4 * (squares * self.columns**2 + _WEIGHTS * self.rows * self.columns)

    def seconds(self, pace: Speed) -> float:
        """Factorise; W*; triangular solves; the recursion; three quadratic forms, and with cross terms one product."""
        products = 9 if self.crossed else 4
        flops = self.columns**3 / 3 + products * self.rows * self.columns**2
        moved = self.rows * self.columns * (_SEARCHED if self.searched else _CHOSEN)
        return self.count * (flops / pace.flops + moved / pace.bytes + self.columns * _COLUMN)


@dataclass
class _Account:
    """What has been seen so far."""

    process: int
    most: Counter[str] = field(default_factory=Counter)
    peak: int = 0
    moment: str = "nothing to do"
    spilled: int = 0
    seconds: dict[str, float] = field(default_factory=lambda: {"forward": 0.0, "collect": 0.0, "solve": 0.0})
    stages: list[float] = field(default_factory=list)

    def hold(self, moment: str, parts: Mapping[str, int]) -> None:
        """These are held at once."""
        total = self.process + sum(parts.values())
        self.most |= Counter(parts)  # the larger of the two, by part
        if total > self.peak:
            self.peak, self.moment = total, moment


class _Estimator:
    def __init__(self, engine: Engine, pace: Speed) -> None:
        self.engine, self.pace = engine, pace
        self.gain = pace.gain if engine.setup.settings.compute == "bfloat16" else 1.0
        self.streams = [s for s in (engine.quantized, engine.plain) if s is not None]
        self.shapes = Counter(_shapes(engine.setup.program, engine.data[b]) for b in engine.mine)
        self.sizes = {s: [Sizes(stream.program, dict(s)) for stream in self.streams] for s in self.shapes}
        self.matrices = dict(_matrices(engine))
        self.rounded: set[str] = set()
        self.codes = 0

    def run(self, free: int) -> Estimate:
        """Stage by stage."""
        account = _Account(resident())
        account.peak = account.process
        for number, stage in enumerate(self.engine.chain.stages):
            before = sum(account.seconds.values())
            self._stage(number, stage, account)
            account.stages.append(sum(account.seconds.values()) - before)
        order = ("codes", "values", "weights", "hessians", "running", "solving")
        parts = {"process": account.process, **{name: account.most[name] for name in order}}
        found = account.peak, account.moment, account.spilled, account.seconds, tuple(account.stages)
        return Estimate(parts, *found, free)

    def _stage(self, number: int, stage: Stage, account: _Account) -> None:
        wants = list(dict.fromkeys(w for worker in self.engine.workers for w in worker.wants(stage)))
        kept, spilled = self._values(stage.starts)
        account.spilled = max(account.spilled, spilled)
        where = self._called(stage)
        sums = {w: self._sums(w) for w in wants if isinstance(w, InputWant)}
        hessians = sum(size for size, _ in sums.values())
        names = self._read(wants)
        weights, running = self._run(stage.starts, names, "collect", account)
        scratch = max((self._width(w) ** 2 * 4 for w in sums), default=0)
        parts = {"codes": self.codes, "values": kept, "weights": weights, "hessians": hessians}
        account.hold(f"collecting {where}", parts | {"running": running + scratch})
        account.seconds["collect"] += sum(seconds for _, seconds in sums.values())
        here = self._solve(stage, account)
        settled = sum(self._settled(w) for w in sums)
        solving = max((m.bytes for m in here), default=0)
        parts = {"codes": self.codes, "values": kept, "hessians": settled, "solving": solving}
        account.hold(f"solving {where}", parts)
        if number + 1 < len(self.engine.chain.stages):
            after, spilled = self._values(stage.ends)
            account.spilled = max(account.spilled, spilled)
            weights, running = self._run(stage.starts, [stage.ends] * len(self.streams), "forward", account)
            parts = {"codes": self.codes, "values": max(kept, after), "weights": weights, "running": running}
            account.hold(f"running {where}", parts)

    def _run(self, starts: Sequence[str], names: list[Sequence[str]], phase: str, account: _Account) -> tuple[int, int]:
        """Bytes of weights and of one batch; the seconds are added to those of the phase."""
        parts = [
            self.engine.slice(stream, starts, list(dict.fromkeys(wanted))) if wanted else None
            for stream, wanted in zip(self.streams, names, strict=True)
        ]
        most_weights = most = 0
        for shapes, count in self.shapes.items():
            costs = [
                SliceCost() if part is None else slice_cost(part, sizes)
                for part, sizes in zip(parts, self.sizes[shapes], strict=True)
            ]
            both = phase == "collect"  # both programs are run for a batch before the next one
            held = [cost.weights for cost in costs]
            most_weights = max(most_weights, sum(held) if both else max(held, default=0))
            left = 0
            for cost in costs:
                most = max(most, left + cost.peak + cost.making)
                left += cost.outputs if both else 0
            flops, moved = sum(c.flops for c in costs), sum(c.moved for c in costs)
            account.seconds[phase] += count * self._time(flops / self.gain, moved)
            if shapes == next(iter(self.shapes)):
                account.seconds[phase] += self._time(0, 2 * sum(c.moved_once for c in costs))
        return most_weights, most

    def _time(self, flops: float, moved: float) -> float:
        return flops / self.pace.flops + moved / self.pace.bytes

    def _read(self, wants: Sequence[Want]) -> list[Sequence[str]]:
        """For each program that is run, the values that are looked at."""
        return [
            [name for w in wants for name in (w.quantized if stream is self.engine.quantized else w.float)]
            for stream in self.streams
        ]

    def _values(self, names: Sequence[str]) -> tuple[int, int]:
        """Bytes between stages that are kept in memory, and that go to files."""
        kept = spilled = 0
        for index, stream in enumerate(self.streams):
            named = {n.name: n for n in stream.program.graph.nodes}
            total = sum(
                count * sum(self.sizes[shapes][index].bytes(named[name].meta["val"]) for name in names)
                for shapes, count in self.shapes.items()
            )
            inside = min(total, stream.values.budget)
            kept, spilled = kept + inside, spilled + total - inside
        return kept, spilled

    def _width(self, want: InputWant) -> int:
        size = want.x_hat.meta["val"].shape[want.axis]
        return next(iter(self.sizes.values()))[0].of(size) if self.sizes else 0

    def _sums(self, want: InputWant) -> tuple[int, float]:
        """Bytes of H and G while they are collected, and seconds for the products."""
        width = self._width(want)
        crossed = want.x is not None
        count = 1 if want.experts is None or want.experts.kind == "part" else want.experts.experts
        seconds = 0.0
        for shapes, batches in self.shapes.items():
            rows = self.sizes[shapes][0].count(want.x_hat.meta["val"]) / max(1, width)
            flops = 2 * rows * width**2 * (0.625 + crossed) / (self.pace.integers if want.in_integers else 1)
            seconds += batches * self._time(flops, (1 + crossed) * count * width**2 * 20)
        return (1 + crossed) * count * width**2 * 8, seconds

    def _settled(self, want: InputWant) -> int:
        """Bytes of H and G once they are collected: as `Gram.settle` leaves them."""
        size, _ = self._sums(want)
        return size if want.x_hat.meta["val"].dtype == torch.float64 else size // 2

    def _solve(self, stage: Stage, account: _Account) -> list[_Matrix]:
        """What is rounded at a stage; each weight once."""
        names = [target.at.name for target in stage.targets if target.changes]
        found = {self.matrices[n].key: self.matrices[n] for n in names if n in self.matrices}
        here = [matrix for key, matrix in found.items() if key not in self.rounded]
        self.rounded |= found.keys()
        budget = self.engine.setup.program.weights.budget
        self.codes = min(budget, self.codes + sum(matrix.stored for matrix in here))
        account.seconds["solve"] += sum(m.seconds(self.pace) for m in here) / self.engine.processes.size
        return here

    def _called(self, stage: Stage) -> str:
        modules = [self.engine.setup.plain.module_of(t.at) or t.at.name for t in stage.targets]
        return modules[0] + (f" and {len(modules) - 1} more" if len(modules) > 1 else "")


def _matrices(engine: Engine) -> Iterator[tuple[str, _Matrix]]:
    """Node of a product → the marked weight it reads."""
    if not any(worker.phase for worker in engine.workers):
        return
    program = engine.setup.program
    specs: dict[fx.Node, QuantSpec] = {mark.source: mark.spec for mark in weight_qdq(program)}
    crossed = engine.quantized is not None and engine.plain is not None
    for c in find_contractions(program):
        if c.weight in specs and not c.kernel and c.groups == 1:
            shape = c.weight.meta["val"].shape
            count = 1 if c.experts is None else shape[c.experts]
            spec = specs[c.weight]
            stored = math.prod(shape) + 4 * math.prod(spec.scale_shape(shape))
            searched = isinstance(spec.observer, LeastError | HalfQuadratic)
            sizes = shape[c.axis_out], shape[c.axis_in]
            dealt = None if c.experts is None else dealing(program, c)
            follows = crossed and (c.experts is None or (dealt is not None and dealt.lines_up))
            yield c.node.name, _Matrix(program.key(c.weight), *sizes, count, stored, searched, follows)


def _shapes(program: Program, batch: dict[str, Tensor]) -> Shapes:
    return tuple((name, tuple(tensor.shape)) for name, tensor in fill(program, batch).items())


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
