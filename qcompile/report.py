"""What a compile did: the plan it followed, a report a pass, and figures a tensor."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from qcompile.manifest import AccumulatorEntry
from qcompile.pass_base import Entry, Report

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True)
class CompileReport:
    """Everything a compile has to say; nothing that a pass left alone is missing from it."""

    plan: Any = None  # the resolution table (`qcompile.recipe.Plan`); plain data once loaded from a file
    passes: list[Report] = field(default_factory=list)
    notes: tuple[str, ...] = ()
    seconds: float = 0.0

    def sqnr(self) -> dict[str, float]:
        """Weight name → signal to quantization noise in decibels."""
        return {
            where: values["sqnr_db"]
            for report in self.passes
            for where, values in report.measured.items()
            if "sqnr_db" in values
        }

    def accumulators(self) -> dict[str, AccumulatorEntry]:
        """Weight name → the proof that its sums fit an accumulator, where a pass kept them within one."""
        start, found = "accumulator_", {}
        for report in self.passes:
            for where, values in report.measured.items():
                proof = {name.removeprefix(start): int(v) for name, v in values.items() if name.startswith(start)}
                if proof:
                    found[where] = AccumulatorEntry.model_validate({**proof, "holds": bool(proof["holds"])})
        return found

    def skipped(self) -> list[tuple[str, Entry]]:
        """Every place that a pass left alone: (pass, place and reason)."""
        return [(report.pass_name, entry) for report in self.passes for entry in report.skipped]

    def to_dict(self) -> dict[str, Any]:
        """Plain data, for JSON."""
        plan = self.plan.to_dict() if hasattr(self.plan, "to_dict") else self.plan
        return {
            "plan": plan,
            "passes": [report.to_dict() for report in self.passes],
            "notes": list(self.notes),
            "seconds": self.seconds,
        }

    def write(self, path: Path) -> None:
        """Write as JSON."""
        path.write_text(json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def read(cls, path: Path) -> CompileReport:
        """Read what `write` wrote; the plan stays plain data."""
        data = json.loads(path.read_text())
        passes = []
        for row in data["passes"]:
            lines = {k: [Entry(**e) for e in row.get(k, ())] for k in ("rewritten", "skipped", "spaces")}
            report = Report(**{**row, **lines})
            passes.append(report)
        return cls(data["plan"], passes, tuple(data["notes"]), data["seconds"])

    def table(self) -> Table:
        """One row a pass."""
        from rich.table import Table

        table = Table("pass", "rewritten", "left alone", "seconds", "drift", title="passes")
        for report in self.passes:
            drift = "" if report.drift is None else f"{report.drift:.1e}"
            row = (
                report.pass_name,
                str(len(report.rewritten)),
                str(len(report.skipped)),
                f"{report.seconds:.2f}",
                drift,
            )
            table.add_row(*row)
        return table
