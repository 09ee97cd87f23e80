"""Runs one pass on a float64 program that is given in parts, and holds it to the function."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

import pytest
from torch import Tensor

from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report
from qcompile.pass_manager import PassManager

sys.path.insert(0, str(Path(__file__).parents[2]))  # makes the references importable as `oracles.…`


class Applied(NamedTuple):
    """A program behind a pass, the report, and the weights as they were."""

    program: Program
    report: Report
    before: Mapping[str, Tensor]


def program_of(inputs: str, weights: str, body: str, outputs: str = "y") -> str:
    """IR text with the types of calls left out."""
    lines = [f"    {line.strip()}" for line in body.strip().splitlines()]
    returned = ", ".join(f'"{name}": {name}' for name in outputs.split())
    return "\n".join([f"def main({inputs}, *, {weights}):", *lines, f"    return {{{returned}}}"])


@pytest.fixture
def text() -> Callable[..., str]:
    """IR text from its parts."""
    return program_of


@pytest.fixture
def applied(feeds: Callable[..., dict[str, Tensor]]) -> Callable[..., Applied]:
    """Apply a pass to a program; the function must stay."""

    def check(pass_: Pass, text: str, values: Mapping[str, Tensor] | None = None) -> Applied:
        program = Program.parse(text, values)
        given = [feeds(program, seed) for seed in (0, 1)]
        expected = [program.run(x) for x in given]
        (report,) = PassManager([pass_]).run(program)
        for x, outputs in zip(given, expected, strict=True):
            assert drift(program.run(x), outputs) <= 1e-12
        return Applied(program, report, Program.parse(text, values).weights)

    return check
