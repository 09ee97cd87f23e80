"""Runs rotations on programs in float64, and holds them to the function."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from torch import Tensor

from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.ir.state import state_pairs
from qcompile.pass_base import Pass, Report
from qcompile.pass_manager import PassManager


def program_of(inputs: str, weights: str, body: str, outputs: str = "y") -> str:
    """IR text with the types of calls left out."""
    lines = [f"    {line.strip()}" for line in body.strip().splitlines()]
    returned = ", ".join(f'"{name}": {name}' for name in outputs.split())
    return "\n".join([f"def main({inputs}, *, {weights}):", *lines, f"    return {{{returned}}}"])


def two_steps(program: Program, feeds: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """What a program computes in two steps, the second one on its own cache; the cache itself is left out."""
    pairs = state_pairs(program)
    first = program.run(feeds[0])
    second = program.run(feeds[1] | {pair.past.name: first[pair.present] for pair in pairs})
    hidden = {pair.present for pair in pairs}
    both = [(f"{name} {i}", out[name]) for i, out in enumerate((first, second)) for name in out if name not in hidden]
    return dict(both)


@pytest.fixture
def text() -> Callable[..., str]:
    """IR text from its parts."""
    return program_of


@pytest.fixture
def rotated(feeds: Callable[..., dict[str, Tensor]]) -> Callable[..., tuple[Program, Report]]:
    """The program behind a rotation, which must keep the function, and the report."""

    def check(text: str, pass_: Pass) -> tuple[Program, Report]:
        program = Program.parse(text)
        given = [feeds(program, seed) for seed in (0, 1)]
        for pair in state_pairs(program):  # a cache that comes in is in the old basis; an empty one is in both
            given[0][pair.past.name] = given[0][pair.past.name][:, :, :0]
        expected = two_steps(program, given)
        (report,) = PassManager([pass_]).run(program)
        program.verify()
        assert str(Program.parse(str(program))) == str(program)
        assert drift(two_steps(program, given), expected) <= 1e-12
        return program, report

    return check
