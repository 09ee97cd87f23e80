"""Small programs from their parts, and their spaces in short."""

from __future__ import annotations

from qcompile.ir.program import Program
from qcompile.spaces import ChannelSpaces, Level


def parsed(inputs: str, weights: str, body: str, outputs: str = "y") -> Program:
    lines = [f"    {line.strip()}" for line in body.strip().splitlines()]
    returned = ", ".join(f'"{name}": {name}' for name in outputs.split())
    return Program.parse("\n".join([f"def main({inputs}, *, {weights}):", *lines, f"    return {{{returned}}}"]))


def shown(spaces: ChannelSpaces, level: Level) -> list[str]:
    """Each space as ``width: kinds and nodes of its uses``."""
    return [f"{s.width}: {', '.join(f'{p.use.kind} {p.node.name}' for p in s.placements)}" for s in spaces[level]]


X = "x: f64[batch, sequence, 6]"
