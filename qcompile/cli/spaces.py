"""`qcompile inspect --spaces`: the channel spaces of a program as a table, as data, or as a picture."""

from __future__ import annotations

from pathlib import Path

from qcompile.cli.show import console, print_json, size, status
from qcompile.errors import QCompileError
from qcompile.ir.program import Program

LEVELS = ("permutation", "diagonal", "orthogonal", "linear")
DEFAULT_PASSES = "raise-norms"
_PICTURES = (".svg", ".html")


def check(level: str | None, picture: Path | None) -> None:
    """Raises QCompileError for a level or a picture that cannot be."""
    if level is not None and level not in LEVELS:
        raise QCompileError(f"--level {level} is no level; there are {', '.join(LEVELS)}")
    if picture is not None and picture.suffix not in _PICTURES:
        raise QCompileError(f"--picture {picture} must end in {' or '.join(_PICTURES)}")
    if picture is not None and picture.exists():
        raise QCompileError(f"{picture} exists; choose another name")


def run(program: Program, level: str | None, every: bool, picture: Path | None, as_json: bool) -> None:
    """Print the spaces that admit `level` (all if None), one row for those that are alike unless `every`."""
    from qcompile.spaces import Level, channel_spaces
    from qcompile.spaces.show import describe, grouped
    from qcompile.spaces.show.table import as_data, table

    spaces = channel_spaces(program)
    found = describe(spaces)
    if picture is not None:
        from qcompile.spaces.show.picture import draw

        text = draw(spaces, found, page=picture.suffix == ".html")
        picture.write_text(text, encoding="utf-8")
        status(f"wrote {picture} ({size(picture.stat().st_size)})")
    groups = grouped([d for d in found if level is None or d.admits(Level[level.upper()])], every)
    if as_json:
        print_json(as_data(groups))
    else:
        console().print(table(groups))
