"""The table of operators: what each does to wires, in code and in words. docs/channel_spaces.md is made from it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from qcompile.spaces.walk import Rule


@dataclass(frozen=True)
class Row:
    """Operators that one rule speaks for."""

    operators: tuple[Any, ...]
    rule: Rule
    says: str


TABLE: list[Row] = []
RULES: dict[Any, Rule] = {}


def rule(*operators: Any, says: str) -> Callable[[Rule], Rule]:
    """Let a function speak for `operators`; `says` stands in the documentation."""

    def add(function: Rule) -> Rule:
        for operator in operators:
            if operator in RULES:
                raise ValueError(f"operator {operator} has a rule already")
            RULES[operator] = function
        TABLE.append(Row(operators, function, says))
        return function

    return add
