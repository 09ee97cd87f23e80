"""From a recipe to the passes that carry it out, in order."""

from __future__ import annotations

from dataclasses import replace

from qcompile.errors import RecipeError, SpecError
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, parse_pass
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN
from qcompile.recipe.model import Recipe, Spec
from qcompile.recipe.specs import activation_spec, weight_spec

DEFAULT_PASSES = ("raise-norms",)


def pipeline(recipe: Recipe) -> list[Pass]:
    """The passes of `recipe`, with those that it implies.

    1. Without `passes`, ``raise-norms``; else the listed ones, in their order.
    2. `insert-qdq`, with the recipe's specs and rules, before the first pass that rounds weights or calibrates (at the
       end where there is none), if the recipe says anything about them. List it bare to put it elsewhere.
    3. `calibrate` right after it where an activation is static and it is not listed.
    4. `rtn` last where weights are quantized and no pass that rounds them is listed.

    Raises RecipeError for a bad spec, an unknown pass or option, or an order that cannot work.
    """
    passes = _with_insertion([_parse(text, i) for i, text in enumerate(recipe.passes or DEFAULT_PASSES)], recipe)
    at = next((i for i, p in enumerate(passes) if isinstance(p, InsertQDQ)), None)
    if at is None:
        return passes
    if early := [p for p in passes[:at] if _needs_insertion(p)]:
        raise RecipeError(f"pass {early[0].name!r} stands before insert-qdq, which it needs; put insert-qdq before it")
    insertion = passes[at]
    assert isinstance(insertion, InsertQDQ)
    weights, activations = _specs(insertion)
    if any(a.when == "static" for a in activations) and not any(isinstance(p, Calibrate) for p in passes):
        passes.insert(at + 1, Calibrate())
    if weights and not any(p.rounds_weights for p in passes):
        passes.append(RTN())
    return passes


def insertion_of(recipe: Recipe) -> InsertQDQ:
    """The pass `insert-qdq` with the specs and rules of `recipe`, specs as strings."""
    rules = [
        replace(
            rule,
            weights=_text(rule.weights, f"rules.{i}.weights"),
            activations=_text(rule.activations, f"rules.{i}.activations"),
        )
        for i, rule in enumerate(recipe.rules)
    ]
    named = {name: _text(getattr(recipe, name), name) for name in ("weights", "activations", "head", "router")}
    return InsertQDQ(**named, rules=tuple(rules))


def _text(spec: Spec, where: str) -> str | None:
    """A spec given by fields as a string; text stays as it was written."""
    if not isinstance(spec, dict):
        return spec
    try:
        return str(QuantSpec.from_fields(spec))
    except SpecError as error:
        raise RecipeError(f"{where}: {error}") from None


def _parse(text: str, index: int) -> Pass:
    try:
        return parse_pass(text)
    except RecipeError as error:
        raise RecipeError(f"passes.{index}: {error}") from None


def _specs(policy: InsertQDQ) -> tuple[list[QuantSpec], list[QuantSpec]]:
    """Every weight spec and every activation spec that is named."""
    weights = {name: getattr(policy, name) for name in ("weights", "head", "router")}
    activations: dict[str, Spec] = {"activations": policy.activations}
    for i, rule in enumerate(policy.rules):
        weights[f"rules.{i}.weights"] = rule.weights
        activations[f"rules.{i}.activations"] = rule.activations
    of_weights = [weight_spec(spec, where) for where, spec in weights.items() if spec != "inherit"]
    of_activations = [activation_spec(spec, where) for where, spec in activations.items() if spec != "inherit"]
    return [s for s in of_weights if s is not None], [s for s in of_activations if s is not None]


def _with_insertion(passes: list[Pass], recipe: Recipe) -> list[Pass]:
    """Put `insert-qdq` where it belongs, or fill in the one that is listed bare."""
    insertion = insertion_of(recipe)
    listed = [i for i, p in enumerate(passes) if isinstance(p, InsertQDQ)]
    if len(listed) > 1:
        raise RecipeError("insert-qdq is listed twice; it reads all of the recipe's specs and rules, so list it once")
    if insertion == InsertQDQ():
        return passes
    if not listed:
        at = next((i for i, p in enumerate(passes) if _needs_insertion(p)), len(passes))
        return [*passes[:at], insertion, *passes[at:]]
    if passes[listed[0]] != InsertQDQ():
        raise RecipeError("insert-qdq has options and the recipe has specs or rules, too; say all of it in one place")
    return [insertion if isinstance(p, InsertQDQ) else p for p in passes]


def _needs_insertion(pass_: Pass) -> bool:
    return pass_.rounds_weights or isinstance(pass_, Calibrate)
