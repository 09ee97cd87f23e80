"""`qcompile passes`, `recipes` and `targets`: what there is to choose from."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

from rich.table import Table

from qcompile.cli.show import console, print_json


def passes(as_json: bool) -> None:
    from qcompile.pass_base import all_passes

    _table("passes", all_passes(), as_json)


def targets(as_json: bool) -> None:
    from qcompile.backend_base import all_backends

    _table("targets", all_backends(), as_json)


def recipes(name: str | None, as_json: bool) -> None:
    from qcompile.recipe import Recipe

    if name is not None:
        recipe = Recipe.load(name)
        print_json(recipe.model_dump(mode="json")) if as_json else print(recipe, end="")
        return
    known = Recipe.presets()
    if as_json:
        print_json(known)
        return
    table = Table("recipe", "what it does")
    for preset, description in known.items():
        table.add_row(preset, description)
    console().print(table)


def _table(title: str, classes: dict[str, Any], as_json: bool) -> None:
    rows = {
        name: {
            "does": (inspect.getdoc(cls) or "").splitlines()[0],
            "options": {f.name: {"type": str(f.type), "default": _default(f)} for f in dataclasses.fields(cls)},
        }
        for name, cls in classes.items()
    }
    if as_json:
        print_json(rows)
        return
    table = Table("name", "what it does", "options (default)", title=title)
    for name, row in rows.items():
        options = "\n".join(f"{option}: {o['type']} = {o['default']}" for option, o in row["options"].items())
        table.add_row(name, row["does"], options)
    console().print(table)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default
