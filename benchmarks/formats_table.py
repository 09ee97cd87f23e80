"""The tables of docs/formats.md: every combination that makes sense, its bits, its errors, and who takes it.

python benchmarks/formats_table.py            print them
python benchmarks/formats_table.py --write    put them between the markers of the page
"""

from __future__ import annotations

import sys
from pathlib import Path
from textwrap import fill

from qcompile.cli.takers import takers
from qcompile.numerics.families import FAMILIES, Family, errors, weight_bits
from qcompile.numerics.spec import QuantSpec

PAGE = Path(__file__).parents[1] / "docs" / "formats.md"
BEGIN, END = "<!-- made by benchmarks/formats_table.py -->", "<!-- end of what was made -->"
HEAD = "| spec | bits | Gaussian | Laplace | outliers | targets |\n|---|---|---|---|---|---|"


def tables() -> str:
    """Markdown: a section and a table for each family."""
    return "\n\n".join(f"### {f.title}\n\n{fill(f.about, 120)}\n\n{HEAD}\n{rows(f)}" for f in FAMILIES)


def rows(family: Family) -> str:
    """The table's lines for one family."""
    return "\n".join(f"| `{text}` | {' | '.join(cells(QuantSpec.parse(text)))} |" for text in family.specs)


def cells(spec: QuantSpec) -> list[str]:
    """Bits a value, three errors, targets."""
    lost = [scientific(error) for error in errors(spec).values()]
    return [bits(weight_bits(spec)), *lost, ", ".join(takers(spec)) or "–"]


def bits(count: float) -> str:
    return f"{count:.4f}".rstrip("0").rstrip(".")


def scientific(value: float) -> str:
    """Three digits: `1.25e-2`."""
    mantissa, exponent = f"{value:.2e}".split("e")
    return f"{mantissa}e{int(exponent)}"


def main() -> None:
    made = tables()
    print(made)
    if "--write" in sys.argv:
        page = PAGE.read_text()
        before, rest = page.split(BEGIN)
        _, after = rest.split(END)
        PAGE.write_text(f"{before}{BEGIN}\n\n{made}\n\n{END}{after}")


if __name__ == "__main__":
    main()
