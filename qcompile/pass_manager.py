"""Runs passes in order, verifies after each, and lets instruments look on."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from torch import Tensor

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


def op_counts(program: Program) -> Counter[str]:
    """How often each operator is called."""
    return Counter(target_name(node.target) for node in program.nodes)
