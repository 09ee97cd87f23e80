"""Runs passes in order, verifies after each, and lets instruments look on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.ir.text import target_name
from qcompile.pass_base import CalibratedPass, Pass, Report


class Instrument(Protocol):
    """Looks at the program before and after each pass; it may write to the report, never edit the program."""

    def before(self, index: int, pass_: Pass, program: Program) -> None: ...
    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None: ...


@dataclass
class PassManager:
    """A pipeline.

    Args:
        passes: run in this order.
        instruments: told before and after each pass.
        batches: calibration batches of token ids ``[batch, sequence]`` for passes that need them.
        stop_after: run only the first so many passes (for bisecting).
    """

    passes: Sequence[Pass]
    instruments: Sequence[Instrument] = ()
    batches: Iterable[Tensor] | None = None
    stop_after: int | None = None

    def run(self, program: Program) -> list[Report]:
        """Edit `program` in place; one report a pass. An error carries a note that names the pass."""
        reports = []
        for index, pass_ in enumerate(self.passes[: self.stop_after]):
            try:
                reports.append(self._one(index, pass_, program))
            except Exception as error:
                before = ", ".join(str(p) for p in self.passes[:index]) or "none"
                error.add_note(f"while running pass {index + 1} of {len(self.passes)}, {pass_} (before it: {before})")
                raise
        return reports

    def _one(self, index: int, pass_: Pass, program: Program) -> Report:
        for instrument in self.instruments:
            instrument.before(index, pass_, program)
        start = time.perf_counter()
        if isinstance(pass_, CalibratedPass):
            if self.batches is None:
                raise QCompileError(f"pass {pass_.name!r} needs calibration data and none is given; give data=")
            report = pass_.run_calibrated(program, self.batches)
        else:
            report = pass_.run(program)
        program.refresh()
        program.verify()
        report.pass_name, report.seconds = str(pass_), time.perf_counter() - start
        for instrument in self.instruments:
            instrument.after(index, pass_, program, report)
        return report


@dataclass
class Dumps:
    """Writes the program before the first pass and after each one: ``00_input.qir``, ``01_raise-norms.qir``, …"""

    folder: Path

    def before(self, index: int, pass_: Pass, program: Program) -> None:
        if index == 0:
            self._write("00_input", program)

    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None:
        self._write(f"{index + 1:02d}_{pass_.name}", program)

    def _write(self, stem: str, program: Program) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        (self.folder / f"{stem}.qir").write_text(f"{program}\n")


@dataclass
class PrintChanged:
    """Prints the program after each pass that changed its text."""

    last: str = ""

    def before(self, index: int, pass_: Pass, program: Program) -> None:
        self.last = self.last or str(program)

    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None:
        text = str(program)
        if text != self.last:
            print(f"# after {pass_}\n{text}\n")
        else:
            print(f"# {pass_} changed nothing\n")
        self.last = text


@dataclass
class OpCounts:
    """Notes in the report how the number of each operator changed."""

    counts: Counter[str] = field(default_factory=Counter)

    def before(self, index: int, pass_: Pass, program: Program) -> None:
        self.counts = op_counts(program)

    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None:
        now = op_counts(program)
        changes = [
            f"{op} {now[op] - self.counts[op]:+d}" for op in sorted(now | self.counts) if now[op] != self.counts[op]
        ]
        report.note("operators: " + (", ".join(changes) or "unchanged"))


@dataclass
class Drift:
    """Runs the program on fixed inputs after each pass and records how far the outputs moved from before it.

    The measure is max |Δ| / max |before| over all floating-point outputs. Passes that promise to keep the function
    and move it by more than `tolerance` raise. With `only_preserving`, no other passes are looked at; with
    `at`, only the outputs after those passes (by index).
    """

    feeds: dict[str, Tensor]
    tolerance: float | None = None
    only_preserving: bool = False
    at: frozenset[int] | None = None
    last: dict[str, Tensor] = field(default_factory=dict)

    def before(self, index: int, pass_: Pass, program: Program) -> None:
        if pass_.preserves_function or not self.only_preserving:
            self.last = self.last or program.run(_fitting(self.feeds, program))

    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None:
        if self.only_preserving and not pass_.preserves_function:
            self.last = {}  # the function changed on purpose: the next pass is measured from here
            return
        if self.at is not None and index not in self.at:
            return
        now = program.run(_fitting(self.feeds, program))
        report.drift = drift(now, self.last)
        self.last = now
        if self.tolerance is not None and pass_.preserves_function and not report.drift <= self.tolerance:
            raise QCompileError(
                f"pass {pass_} changed the function: outputs moved by {report.drift:.2e} of their maximum "
                f"(tolerance {self.tolerance:.0e}); leave it out, or find the culprit with qcompile bisect"
            )


def _fitting(feeds: dict[str, Tensor], program: Program) -> dict[str, Tensor]:
    """`feeds` for the inputs that the program has by now: a pass may have changed those of a cache."""
    inputs = {node.name: node.meta["val"].dtype for node in program.inputs}
    return fill(program, {name: feed for name, feed in feeds.items() if inputs.get(name) == feed.dtype})


def op_counts(program: Program) -> Counter[str]:
    """How often each operator is called."""
    return Counter(target_name(node.target) for node in program.nodes)


def drift(now: dict[str, Tensor], before: dict[str, Tensor]) -> float:
    """max |now − before| / max |before|, the largest over floating-point outputs; inf where shapes differ or nan.

    An output that is codes now (a cache, say) is not compared.
    """
    worst = 0.0
    for name, old in before.items():
        new = now.get(name)
        if not old.is_floating_point() or old.numel() == 0 or (new is not None and not new.is_floating_point()):
            continue
        if new is None or new.shape != old.shape:
            return float("inf")
        moved = (new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-300)
        worst = max(worst, float(torch.nan_to_num(moved, nan=float("inf"))))
    return worst


@dataclass(frozen=True)
class Bisection:
    """The first pass that moved the outputs by more than the tolerance."""

    index: int
    pass_: Pass
    drift: float


def bisect(
    program: Program,
    passes: Sequence[Pass],
    feeds: dict[str, Tensor],
    tolerance: float,
    batches: Iterable[Tensor] | None = None,
) -> Bisection | None:
    """Find the first pass after which the outputs differ from the unchanged program's by more than `tolerance`.

    Runs O(log n) prefixes of the pipeline on copies of `program`, assuming that a program once broken stays broken.
    Returns None where the whole pipeline keeps within the tolerance.
    """
    reference = program.run(feeds)

    def moved(count: int) -> float:
        copy = program.clone()
        PassManager(passes, batches=batches, stop_after=count).run(copy)
        return drift(copy.run(_fitting(feeds, copy)), reference)

    if (whole := moved(len(passes))) <= tolerance:
        return None
    good, bad, worst = 0, len(passes), whole
    while bad - good > 1:
        middle = (good + bad) // 2
        if (now := moved(middle)) <= tolerance:
            good = middle
        else:
            bad, worst = middle, now
    return Bisection(bad - 1, passes[bad - 1], worst)
