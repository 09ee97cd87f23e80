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
        print_json(recipe.to_dict()) if as_json else print(recipe, end="")
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
    does = {name: (inspect.getdoc(cls) or "").splitlines()[0] for name, cls in classes.items()}
    options = {
        name: {f.name: (str(f.type), _default(f)) for f in dataclasses.fields(cls)} for name, cls in classes.items()
    }
    if as_json:
        shown = {n: {o: {"type": t, "default": d} for o, (t, d) in options[n].items()} for n in classes}
        print_json({n: {"does": does[n], "options": shown[n]} for n in classes})
        return
    table = Table("name", "what it does", "options (default)", title=title)
    for name in classes:
        table.add_row(name, does[name], "\n".join(f"{o}: {t} = {d}" for o, (t, d) in options[name].items()))
    console().print(table)


def _default(field: dataclasses.Field[Any]) -> Any:
    if field.default_factory is not dataclasses.MISSING:
        return field.default_factory()
    return "required" if field.default is dataclasses.MISSING else field.default
