"""What a data-driven pass does segment by segment: the engine runs all that stand in a row at once.

    wants ─▶ (the engine collects them over all batches) ─▶ solve ─▶ apply ─▶ the engine runs on, with what was applied

`solve` computes from statistics and edits nothing; `apply` edits the program and computes nothing. What lies between
them is tensors and plain data: it can be written to a file, and come from one.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from torch import Tensor

from qcompile.calibration.chain import Stage, Target
from qcompile.calibration.processes import Processes
from qcompile.calibration.settings import Settings
from qcompile.calibration.statistics import Collector, Want
from qcompile.data.padding import Padding
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Report


@dataclass(frozen=True)
class Setup:
    """What a worker begins with: the program that is edited, a float copy whose nodes have the same names, settings."""

    program: Program
    plain: Program
    settings: Settings

    @cached_property
    def padding(self) -> Padding:
        """Leaves padding out of the values of `program`."""
        return Padding(self.program)

    @cached_property
    def padding_float(self) -> Padding:
        """Leaves padding out of the values of `plain`."""
        return Padding(self.plain)


@dataclass
class Solved:
    """What a worker found for one stage: tensors by name, and plain data that JSON can hold."""

    tensors: dict[str, Tensor] = field(default_factory=dict)
    facts: dict[str, Any] = field(default_factory=dict)


class Worker(ABC):
    """One pass at work in one run of the engine.

    `phase`: all workers of a lower phase have settled a stage before those of a higher one are shown it. 0 changes what
    products read, 1 changes products.
    """

    phase: int = 1
    needs_quantized: bool = True
    needs_float: bool = False

    def waiting(self) -> dict[str, str]:
        """Nodes of the program that hold what a weight will be rounded to, and the node of the weight: what is read in
        its place until then.
        """
        return {}

    @abstractmethod
    def targets(self) -> Sequence[Target]:
        """The places it looks at, as nodes of the float copy."""

    @abstractmethod
    def wants(self, stage: Stage) -> Sequence[Want]:
        """What it needs to know at a stage."""

    @abstractmethod
    def solve(self, stage: Stage, found: Mapping[Want, Collector], processes: Processes) -> Solved:
        """What to do at a stage."""

    @abstractmethod
    def apply(self, stage: Stage, solved: Solved) -> None:
        """Do it."""

    @abstractmethod
    def finish(self) -> Report:
        """What was done, once all stages are settled; here is the place for what no stage reached."""


class SegmentPass(CalibratedPass):
    """A pass that works segment by segment. Several in a row share one run of the engine, and the data is run once."""

    @abstractmethod
    def begin(self, setup: Setup) -> Worker:
        """The worker for one run."""

    def run_calibrated(self, program: Program, batches: Any) -> Report:
        """Run the engine for this pass alone."""
        from qcompile.calibration.engine import run_segments

        return run_segments(program, [self], batches)[0]
