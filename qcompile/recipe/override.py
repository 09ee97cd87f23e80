"""Changing single values of a recipe from ``path=value`` texts (``--set`` on the command line)."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import yaml

from qcompile.errors import RecipeError, SpecError, nearest
from qcompile.recipe.model import Calibration, Recipe, Rule
from qcompile.recipe.parts import PARTS, Parts, Spec

_SPECS = ("weights", "activations", "outputs", "head", "router", "embeddings")
_OF_WEIGHTS = ("weights", "head", "router", "embeddings")
_RULE_SPECS = ("weights", "activations", "outputs")


def override(recipe: Recipe, assignments: Sequence[str]) -> Recipe:
    """`recipe` with each ``path=value`` applied in turn; see `Recipe.override`."""
    for text in assignments:
        path, equals, value = text.partition("=")
        steps = path.strip().split(".")
        if not equals or not all(steps):
            raise RecipeError(f"--set {text!r} is not written like path=value, as weights.group=64")
        try:
            recipe = _assign(recipe, steps, yaml.safe_load(value))
        except yaml.YAMLError:
            raise RecipeError(f"--set {text!r}: {value!r} is not a YAML value") from None
        except RecipeError as error:
            raise RecipeError(f"--set {text!r}: {error}") from None
    return recipe


def _assign(recipe: Recipe, steps: list[str], value: Any) -> Recipe:
    data = recipe.to_dict()
    first, rest = steps[0], steps[1:]
    _known(first, list(Recipe.model_fields), "recipe field")
    if not rest:
        data[first] = value
    elif first in _SPECS:
        data[first] = _with_field(getattr(recipe, first), first, rest, value)
    elif first in PARTS:
        data[first] = _with_part(getattr(recipe, first), first, rest, value)
    elif first == "calibration":
        _only(rest, list(Calibration.model_fields), "calibration")
        data[first] = {**recipe.calibration.model_dump(), rest[0]: value}
    elif first in ("rules", "passes"):
        _assign_item(data, first, rest, value)
    else:
        raise RecipeError(f"{first!r} has no fields; write {first}=…")
    return Recipe.model_validate(data)


def _assign_item(data: dict[str, Any], first: str, rest: list[str], value: Any) -> None:
    items = list(data.get(first, ()))
    index = int(rest[0]) if rest[0].isdigit() else len(items)
    if index >= len(items):
        has = f"0 to {len(items) - 1}" if items else "no items"
        raise RecipeError(f"{first}.{rest[0]} does not exist; {first} has {has}")
    if len(rest) == 1:
        items[index] = value
    elif first == "passes":
        raise RecipeError(f"a pass is set as a whole; write passes.{index}=name(option=value)")
    else:
        name, deeper = rest[1], rest[2:]
        _known(name, [f.name for f in dataclasses.fields(Rule)], "rule field")
        if deeper and name not in _RULE_SPECS:
            raise RecipeError(f"{name!r} has no fields; write {first}.{index}.{name}=…")
        where = f"{first}.{index}.{name}"
        new = _with_field(items[index].get(name, "inherit"), where, deeper, value) if deeper else value
        items[index] = {**items[index], name: new}
    data[first] = items


def _with_part(parts: Parts, where: str, rest: list[str], value: Any) -> Any:
    """The parts with some of them, or one field of some, changed; a plain spec has fields of its own."""
    name, deeper = rest[0], rest[1:]
    if chosen := parts.parts_of(name):
        changed = {p: _with_field(parts.specs[p], f"{where}.{p}", deeper, value) if deeper else value for p in chosen}
        return {**parts.specs, **changed}
    plain = parts.plain()
    if plain is None or (isinstance(plain, dict) and "element" not in plain):
        hint = "" if plain else f"; {where} is null, so set it or one of them first"
        _known(name, parts.names(), f"{where} field", hint)
    try:
        return _with_field(plain, where, rest, value)
    except RecipeError as error:
        raise RecipeError(f"{error}; the parts of {where} are {', '.join(parts.names())}") from None


def _with_field(spec: Spec, where: str, rest: list[str], value: Any) -> str:
    """The spec with one field changed, as a spec string."""
    from qcompile.numerics.spec import QuantSpec

    if spec is None or spec == "inherit":
        example = "int8 sym" if where.endswith(_OF_WEIGHTS) else "int8 sym dynamic"
        raise RecipeError(f"{where} is {spec or 'null'}, which has no fields; set it first, as {where}={example}")
    try:
        parsed = QuantSpec.parse(spec) if isinstance(spec, str) else QuantSpec.from_fields(spec)
        return str(parsed.with_fields({".".join(rest): value}))
    except SpecError as error:
        raise RecipeError(f"{where}: {error}") from None


def _only(rest: list[str], names: list[str], where: str) -> None:
    if len(rest) != 1:
        raise RecipeError(f"{'.'.join([where, *rest])} does not exist; {where} has {', '.join(names)}")
    _known(rest[0], names, f"{where} field")


def _known(name: str, names: list[str], what: str, hint: str = "") -> None:
    if name not in names:
        fields = f"the fields there are {', '.join(names)}"
        raise RecipeError(f"{what} {name!r} is unknown{nearest(name, names)}; {fields}{hint}")
