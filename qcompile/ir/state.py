"""The state of a decoder: inputs that a program's own outputs feed at the next step, paired by name.

present_0_key ⟶ past_key_values_0_key          present_0_value_scale ⟶ past_key_values_0_value_scale
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from qcompile.ir.program import Program

_PAST, _PRESENT = "past_key_values_", "present_"


@dataclass(frozen=True)
class StatePair:
    """An input of the cache and the name of the output that becomes it at the next step."""

    past: fx.Node
    present: str


def state_pairs(program: Program) -> list[StatePair]:
    """Every part of the cache that the program both takes and returns, in the order of its inputs."""
    pairs = [StatePair(node, present_name(node.name)) for node in program.inputs if node.name.startswith(_PAST)]
    return [pair for pair in pairs if pair.present in program.output_names]


def present_name(past: str) -> str:
    """The name of the output that becomes the input `past` at the next step."""
    return past.replace(_PAST, _PRESENT, 1)


def past_name(present: str) -> str | None:
    """The name of the input that an output becomes at the next step; None for an output that is no state."""
    return present.replace(_PRESENT, _PAST, 1) if present.startswith(_PRESENT) else None
