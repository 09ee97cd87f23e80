"""Remove what nothing reads: calls whose results are unused, and weights behind them.

    u = relu(x)          (nothing)
    y = neg(x)     ⟶     y = neg(x)

Exact. Inputs stay, read or not: they are the program's signature.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, place, register


@register
@dataclass(frozen=True)
class DeadCode(Pass):
    """Remove unread calls and unread weights."""

    name: ClassVar[str] = "dead-code"

    def run(self, program: Program) -> Report:
        """Remove them, and name each in the report."""
        report = Report()
        calls = {node: place(node) for node in program.nodes}
        weights = list(program.weights)
        program.refresh()
        kept, read = set(program.graph.nodes), {program.key(node) for node in program.weight_nodes}
        for node, name in calls.items():
            if node not in kept:
                report.rewrote(name, "nothing reads it")
        for key in weights:
            if key not in read:
                report.rewrote(key, "no call reads this weight")
                program.weights.pop(key, None)  # one that never had a placeholder is still there
        for node in program.inputs:
            if not node.users:
                report.skip(node, "nothing reads this input, but it is part of the program's signature")
        return report
