"""The passes that quantize what flows through attention and the cache, and what they would do to a program."""

from __future__ import annotations

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, make_pass, parse_pass
from qcompile.recipe.model import Recipe
from qcompile.recipe.parts import PARTS, Parts, Spec
from qcompile.recipe.plan import Decision
from qcompile.recipe.specs import activation_spec

VALUE_PASSES = {"kv_cache": "quantize-kv-cache", "attention": "quantize-attention"}
"""Field of a recipe → the pass that carries it out, in the order they run: what is cached comes before its readers."""


def value_passes(recipe: Recipe) -> list[Pass]:
    """The passes for `attention` and `kv_cache`, specs as strings. RecipeError for a bad spec, naming the part."""
    fields = {name: getattr(recipe, name) for name in VALUE_PASSES}
    return [_value_pass(name, parts) for name, parts in fields.items() if parts.plain() is not None]


def value_specs(pass_: Pass) -> list[QuantSpec]:
    """The specs of one of those passes. RecipeError for a bad one."""
    field = next(field for field, name in VALUE_PASSES.items() if name == pass_.name)
    parts = {name: getattr(pass_, name) for name in PARTS[field].model_fields}
    specs = [activation_spec(spec, f"{pass_.name}, {name}") for name, spec in parts.items()]
    return [spec for spec in specs if spec is not None]


def decide_values(program: Program, recipe: Recipe) -> tuple[Decision, ...]:
    """What `attention` and `kv_cache` do to `program`: found by doing it to a copy, of which no weight is read."""
    passes = value_passes(recipe)
    if not passes:
        return ()
    fields = {name: field for field, name in VALUE_PASSES.items()}
    copy, found = program.clone(), []
    for pass_ in passes:
        report, field = pass_.run(copy), fields[pass_.name]
        found += [Decision(entry.where, field, entry.what, "recipe") for entry in report.rewritten]
        found += [Decision(entry.where, field, None, entry.what) for entry in report.skipped]
    return tuple(found)


def _value_pass(field: str, parts: Parts) -> Pass:
    specs = {name: _text(spec, f"{field}.{name}") for name, spec in parts.specs.items() if spec is not None}
    return make_pass(type(parse_pass(VALUE_PASSES[field])), specs)


def _text(spec: Spec, where: str) -> str:
    """A spec as a string; text stays as it was written."""
    activation_spec(spec, where)
    assert spec is not None
    if isinstance(spec, str):
        return spec
    try:
        return str(QuantSpec.from_fields(spec))
    except SpecError as error:
        raise RecipeError(f"{where}: {error}") from None
