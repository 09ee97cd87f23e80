"""What each operator between two products lets through, what it says where it does not, and that applying it is exact.

A case is a piece of program between ``h = linear(x, w, b)`` of 8 channels and ``y = linear(r, o)``.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from spaces.rule_cases import CASES
from torch import Tensor

from qcompile.drift import drift
from qcompile.hadamard.rotation import RandomOrthogonal
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces import ChannelSpaces, Level, Space, channel_spaces
from qcompile.spaces.apply import Edits


def program_of(body: str) -> Program:
    """The program of a case; weights, inputs and readers that a line does not name are left out."""
    lines = ["h = aten.linear.default(x, w, b)", *body.strip().splitlines()]
    lines = [line.strip() for line in lines]
    if not any(line.startswith("y =") for line in lines):
        lines.append("y = aten.linear.default(r, o)")
    names = set(
        " ".join(lines)
        .replace("(", " ")
        .replace(")", " ")
        .replace(",", " ")
        .replace("[", " ")
        .replace("]", " ")
        .split()
    )
    inputs = {
        "t": "f64[batch, sequence, 1]",
        "m": "bool[batch, sequence, 1]",
        "i": "i64[sequence]",
        "c": "f64[sequence, 4]",
        "e": "f64[batch, sequence, 8]",
    }
    weights = {
        "w2": "f64[8, 6]",
        "g": "f64[8]",
        "o": "f64[5, 8]",
        "o4": "f64[5, 4]",
        "o16": "f64[5, 16]",
        "k": "f64[8, 1, 3]",
        "k8": "f64[5, 8, 3]",
    }
    taken = [f"{name}: {kind}" for name, kind in inputs.items() if name in names]
    held = [f"{name}: {kind}" for name, kind in weights.items() if name in names]
    head = ", ".join(["x: f64[batch, sequence, 6]", *taken, "*", "w: f64[8, 6]", "b: f64[8]", *held])
    return Program.parse("\n".join([f"def main({head}):", *(f"    {line}" for line in lines), '    return {"y": y}']))


def starting(spaces: ChannelSpaces, level: Level) -> list[Space]:
    """Spaces with a source in w."""
    return [s for s in spaces[level] if any(p.use.weight.name == "w" for p in s.sources if p.use.weight is not None)]


def limits(spaces: ChannelSpaces) -> str:
    """What limits the wires of w, over all levels, in the order of the program."""
    use = next(u for u in spaces.uses if u.weight is not None and u.weight.name == "w" and u.kind == "source")
    found = [limit for level in Level for limit in spaces.all_limits(level, use.ids)]
    return "; ".join(dict.fromkeys(map(str, found)))


@pytest.mark.parametrize("name", CASES)
def test_what_passes(name: str) -> None:
    body, expected, reason = CASES[name]
    spaces = channel_spaces(program_of(body))
    found = tuple([s.width for s in starting(spaces, level)] for level in Level)
    assert (found, limits(spaces)) == (expected, reason)


def applied(edits: Edits, space: Space) -> None:
    """Act on one space with a transformation as general as its level."""
    generator = torch.Generator().manual_seed(space.width)
    if space.level is Level.PERMUTATION:
        edits.permute(space, torch.randperm(space.width, generator=generator))
    elif space.level is Level.DIAGONAL:
        edits.scale(space, torch.rand(space.width, generator=generator, dtype=torch.float64) * 3 + 0.2)
    else:
        edits.rotate(space, RandomOrthogonal(space.width, 1))


MORE = {
    "channels and their mirror image": "f = aten.flip.default(h, [-1])\nr = aten.add.Tensor(h, f)",
    "one channel times others": """u = aten.slice.Tensor(h, -1, 0, 1)
    v = aten.slice.Tensor(h, -1, 1, 5)
    f = aten.mul.Tensor(u, v)
    y = aten.linear.default(f, o4)""",
}


@pytest.mark.parametrize("name", [*CASES, *MORE])
def test_it_is_exact(name: str, feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = program_of(CASES[name][0] if name in CASES else MORE[name])
    inputs = feeds(program)
    expected = program.run(inputs)
    for level in (Level.PERMUTATION, Level.DIAGONAL, Level.ORTHOGONAL):
        now = program.clone()
        spaces = channel_spaces(now)
        edits = Edits(spaces, Report())
        for space in spaces[level]:
            applied(edits, space)
        edits.commit()
        assert drift(now.run(inputs), expected) <= 1e-11, level
