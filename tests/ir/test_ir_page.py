"""docs/ir.md says what the code does."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompile.ir.program import Program
from qcompile.ir.types import DTYPES
from qcompile.ir.verify import RULES

PAGE = (Path(__file__).parents[2] / "docs" / "ir.md").read_text()
EXAMPLES = re.findall(r"```text\n(def main.*?)\n```", PAGE, re.DOTALL)


def _table(heading: str) -> list[tuple[str, str]]:
    """The rows of the two-column table under a heading of the given column names."""
    after = PAGE.split(heading)[1].lstrip("\n")
    rows = re.match(r"(\|.*\n)+", after)
    assert rows is not None
    cells = [[c.strip() for c in row.strip("|").split("|")] for row in rows[0].splitlines()]
    return [(first.strip("`"), second.strip("`")) for first, second in cells]


def test_the_table_of_rules_is_the_verifiers() -> None:
    assert _table("| rule | holds when |\n|---|---|") == [(rule.name, rule.says) for rule in RULES]


def test_the_table_of_types_is_the_printers() -> None:
    assert _table("| text | dtype |\n|---|---|") == [(short, str(dtype)) for short, dtype in DTYPES.items()]


def test_there_is_an_example() -> None:
    assert EXAMPLES


@pytest.mark.parametrize("text", EXAMPLES)
def test_examples_are_what_is_printed(text: str) -> None:
    assert str(Program.parse(text)) == text


def test_types_may_be_left_out() -> None:
    (text,) = EXAMPLES
    bare = re.sub(r"(?m)^    (\w+): .* = (aten|operator|qcompile)", r"    \1 = \2", text)
    assert bare != text
    assert str(Program.parse(bare)) == text
