"""The parts of docs/channel_spaces.md that come from the code: the spaces of its example, and the table of operators.

python benchmarks/channel_spaces_page.py            print them
python benchmarks/channel_spaces_page.py --write    put them between the markers of the page
"""

from __future__ import annotations

import operator
import re
import sys
from io import StringIO
from pathlib import Path

import torch
from rich.console import Console

from qcompile.ir.program import Program
from qcompile.spaces import channel_spaces
from qcompile.spaces.registry import TABLE, Row
from qcompile.spaces.show import describe, grouped
from qcompile.spaces.show.table import table

PAGE = Path(__file__).parents[1] / "docs" / "channel_spaces.md"
END = "<!-- end of what was made -->"
KINDS = {
    "products": "Products",
    "indexing": "Lookups, indices",
    "pointwise": "Element by element",
    "norms": "Norms",
    "attention": "Attention",
    "views": "Moves",
    "joining": "Joins, constants",
    "reductions": "Reductions",
    "online": "Put in by passes",
}


def begin(part: str) -> str:
    """The line before a part."""
    return f"<!-- {part}: made by benchmarks/channel_spaces_page.py -->"


def parts() -> dict[str, str]:
    """Markdown of each part that is made."""
    text = PAGE.read_text()
    return {"example": example(block(text, "text example.qir")), "operators": operators()}


def block(text: str, name: str) -> str:
    """A fenced block of the page."""
    found = re.search(rf"^```{re.escape(name)}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    if found is None:
        raise SystemExit(f"the page has no block {name!r}")
    return found[1]


def example(text: str) -> str:
    """The table that `qcompile inspect --spaces` prints of the page's program."""
    found = describe(channel_spaces(Program.parse(text)))
    out = Console(width=118, file=StringIO(), color_system=None, legacy_windows=False)
    out.print(table(grouped(found)))
    lines = out.file.getvalue().splitlines()  # type: ignore[attr-defined]
    return "```text\n" + "\n".join(line.rstrip() for line in lines) + "\n```"


def operators() -> str:
    """A table of every rule, by the modules of `qcompile/spaces/rules/`."""
    found = ["| operators | what they do to spaces |\n|---|---|"]
    for module, heading in KINDS.items():
        found.append(f"| **{heading}** | `rules/{module}.py` |")
        found += [line(row) for row in TABLE if row.rule.__module__.rpartition(".")[2] == module]
    return "\n".join(found)


def line(row: Row) -> str:
    """One row of the table, in Markdown."""
    names = dict.fromkeys(name(target) for target in row.operators if _always(target))
    return f"| {', '.join(f'`{n}`' for n in names)} | {row.says.replace('|', '∣')} |"


def name(target: object) -> str:
    """An operator's name, without its overload."""
    if isinstance(target, torch._ops.OpOverload):
        return target._schema.name.rpartition(":")[2]
    return f"operator.{target.__name__}" if target is operator.getitem else str(target)


def _always(target: object) -> bool:
    """Whether an operator is there whatever has been imported."""
    return not isinstance(target, torch._ops.OpOverload) or target.namespace in ("aten", "qcompile")


def written(page: str, made: dict[str, str]) -> str:
    """The page with its parts as they are made now."""
    for part, text in made.items():
        before, rest = page.split(begin(part))
        _, after = rest.split(END, 1)
        page = f"{before}{begin(part)}\n\n{text}\n\n{END}{after}"
    return page


def main() -> None:
    made = parts()
    print(*made.values(), sep="\n\n")
    if "--write" in sys.argv:
        PAGE.write_text(written(PAGE.read_text(), made))


if __name__ == "__main__":
    main()
