"""Runs passes in order, verifies after each, and lets instruments look on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

from qcompile.calibration.settings import Settings
from qcompile.calibration.worker import SegmentPass
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.text import target_name
from qcompile.pass_base import CalibratedPass, Pass, Report


class Instrument(Protocol):
    """Looks at the program before and after each pass; it may write to the report, never edit the program."""

    def before(self, index: int, pass_: Pass, program: Program) -> None: ...
    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None: ...


@dataclass
class PassManager:
    """A pipeline. Passes in a row that work segment by segment share one run over the calibration data.

    Args:
        passes: run in this order.
        instruments: told before and after each pass.
        batches: calibration batches for passes that need them: token ids ``[batch, sequence]``, or inputs by name.
        stop_after: run only the first so many passes (for bisecting).
        settings: how segments are run.
        resume: a folder where finished segments are kept, and found again.
    """

    passes: Sequence[Pass]
    instruments: Sequence[Instrument] = ()
    batches: Iterable[Any] | None = None
    stop_after: int | None = None
    settings: Settings = field(default_factory=Settings)
    resume: Path | None = None

    def run(self, program: Program) -> list[Report]:
        """Edit `program` in place; one report a pass. An error carries a note that names the pass."""
        reports: list[Report] = []
        for group in together(self.passes[: self.stop_after]):
            try:
                reports += self._group(len(reports), group, program)
            except Exception as error:
                before = ", ".join(str(p) for p in self.passes[: len(reports)]) or "none"
                names = ", ".join(map(str, group))
                number = len(reports) + 1
                error.add_note(f"while running pass {number} of {len(self.passes)}, {names} (before it: {before})")
                raise
        return reports

    def _group(self, first: int, group: Sequence[Pass], program: Program) -> list[Report]:
        """One pass, or several that share a run; what an instrument sees before each of those is the same program."""
        for index, pass_ in enumerate(group, first):
            for instrument in self.instruments:
                instrument.before(index, pass_, program)
        start = time.perf_counter()
        reports = self._run(first, group, program)
        program.refresh()
        program.verify()
        seconds = (time.perf_counter() - start) / len(group)
        for index, (pass_, report) in enumerate(zip(group, reports, strict=True), first):
            report.pass_name, report.seconds = str(pass_), seconds
            for instrument in self.instruments:
                instrument.after(index, pass_, program, report)
        return reports

    def _run(self, first: int, group: Sequence[Pass], program: Program) -> list[Report]:
        pass_ = group[0]
        if not isinstance(pass_, CalibratedPass):
            return [pass_.run(program)]
        if self.batches is None:
            raise QCompileError(f"pass {pass_.name!r} needs calibration data and none is given; give data=")
        if not isinstance(pass_, SegmentPass):
            return [pass_.run_calibrated(program, self.batches)]
        from qcompile.calibration.engine import run_segments

        made = [p for p in group if isinstance(p, SegmentPass)]
        folder = None if self.resume is None else self.resume / f"{first + 1:02d}-{pass_.name}"
        return run_segments(program, made, self.batches, self.settings, folder)


def together(passes: Sequence[Pass]) -> Iterator[list[Pass]]:
    """The passes one by one, but those in a row that work segment by segment together."""
    for whole, members in groupby(passes, lambda p: isinstance(p, SegmentPass)):
        if whole:
            yield list(members)
        else:
            yield from ([p] for p in members)


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


def op_counts(program: Program) -> Counter[str]:
    """How often each operator is called."""
    return Counter(target_name(node.target) for node in program.nodes)
