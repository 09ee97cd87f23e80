"""From a recipe to the passes that carry it out, in order."""

from __future__ import annotations

from dataclasses import replace

from qcompile.errors import RecipeError, SpecError
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Pass, parse_pass
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN
from qcompile.passes.quantize.share_global_scale import ShareGlobalScale
from qcompile.passes.round.bias_correction import BiasCorrection
from qcompile.recipe.model import Recipe
from qcompile.recipe.parts import Spec
from qcompile.recipe.specs import activation_spec, weight_spec
from qcompile.recipe.values import VALUE_PASSES, value_passes, value_specs

DEFAULT_PASSES = ("raise-norms",)

_WEIGHTS = ("weights", "head", "router", "embeddings")
_VALUES = ("activations", "outputs")


def pipeline(recipe: Recipe) -> list[Pass]:
    """The passes of `recipe`, with those that it implies.

    1. Without `passes`, ``raise-norms``; else the listed ones, in their order.
    2. `insert-qdq`, with the recipe's specs and rules, before the first pass that rounds weights or calibrates (at the
       end where there is none), if the recipe says anything about them. List it bare to put it elsewhere.
    3. `quantize-kv-cache` and `quantize-attention` behind it, if the recipe says anything about those; list them bare
       to put them elsewhere.
    4. `calibrate` behind these where a scale is static and it is not listed.
    5. `rtn` last where weights are quantized and no pass that rounds them is listed.

    Raises RecipeError for a bad spec, an unknown pass or option, or an order that cannot work.
    """
    passes = [_parse(text, i) for i, text in enumerate(recipe.passes or DEFAULT_PASSES)]
    passes = _with_values(_with_insertion(passes, recipe), value_passes(recipe))
    _check_order(passes)
    static = [i for i, p in enumerate(passes) if any(spec.when == "static" for spec in _flowing(p))]
    if static and not any(isinstance(p, Calibrate) for p in passes):
        passes.insert(_behind_marks(passes, static[-1]), Calibrate())
    rounded = [p for p in passes if isinstance(p, InsertQDQ) and _weight_specs(p)]
    if rounded and not any(p.rounds_weights for p in passes):
        passes.append(RTN())
    return passes


def insertion_of(recipe: Recipe) -> InsertQDQ:
    """The pass `insert-qdq` with the specs and rules of `recipe`, specs as strings."""
    rules = [
        replace(
            rule,
            weights=_text(rule.weights, f"rules.{i}.weights"),
            activations=_text(rule.activations, f"rules.{i}.activations"),
            outputs=_text(rule.outputs, f"rules.{i}.outputs"),
        )
        for i, rule in enumerate(recipe.rules)
    ]
    named = {name: _text(getattr(recipe, name), name) for name in (*_WEIGHTS, *_VALUES)}
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


def _weight_specs(policy: InsertQDQ) -> list[QuantSpec]:
    """Every weight spec that is named."""
    named: dict[str, Spec] = {name: getattr(policy, name) for name in _WEIGHTS}
    named |= {f"rules.{i}.weights": rule.weights for i, rule in enumerate(policy.rules)}
    specs = [weight_spec(spec, where) for where, spec in named.items() if spec != "inherit"]
    return [spec for spec in specs if spec is not None]


def _flowing(pass_: Pass) -> list[QuantSpec]:
    """Every spec of a value that is no weight, named by one of the passes that mark what is quantized."""
    if not isinstance(pass_, InsertQDQ):
        return value_specs(pass_) if pass_.name in VALUE_PASSES.values() else []
    named: dict[str, Spec] = {name: getattr(pass_, name) for name in _VALUES}
    for i, rule in enumerate(pass_.rules):
        named |= {f"rules.{i}.activations": rule.activations, f"rules.{i}.outputs": rule.outputs}
    specs = [activation_spec(spec, where) for where, spec in named.items() if spec != "inherit"]
    return [spec for spec in specs if spec is not None]


def _with_insertion(passes: list[Pass], recipe: Recipe) -> list[Pass]:
    """Put `insert-qdq` where it belongs, or fill in the one that is listed bare."""
    insertion = insertion_of(recipe)
    listed = [i for i, p in enumerate(passes) if isinstance(p, InsertQDQ)]
    if len(listed) > 1:
        raise RecipeError("insert-qdq is listed twice; it reads all of the recipe's specs and rules, so list it once")
    if insertion == InsertQDQ():
        return passes
    if not listed:
        at = _first_reader_of_marks(passes)
        return [*passes[:at], insertion, *passes[at:]]
    return _filled(passes, listed[0], insertion)


def _with_values(passes: list[Pass], made: list[Pass]) -> list[Pass]:
    """Put the passes for attention and the cache behind `insert-qdq`, or fill in those that are listed bare."""
    missing = []
    for pass_ in made:
        listed = [i for i, p in enumerate(passes) if p.name == pass_.name]
        if len(listed) > 1:
            raise RecipeError(f"{pass_.name} is listed twice; list it once")
        if listed:
            passes = _filled(passes, listed[0], pass_)
        else:
            missing.append(pass_)
    insertion = [i + 1 for i, p in enumerate(passes) if isinstance(p, InsertQDQ)]
    at = insertion[0] if insertion else _first_reader_of_marks(passes)
    return [*passes[:at], *missing, *passes[at:]]


def _filled(passes: list[Pass], at: int, made: Pass) -> list[Pass]:
    """`passes` with the one that is listed bare at a place made the recipe's."""
    if passes[at] != type(made)():
        raise RecipeError(f"{made.name} has options and the recipe has specs or rules, too; say all of it in one place")
    return [*passes[:at], made, *passes[at + 1 :]]


def _check_order(passes: list[Pass]) -> None:
    """RecipeError where a pass stands before the one that marks what it works on."""
    for at, mark in enumerate(passes):
        for early in passes[:at]:
            if isinstance(mark, InsertQDQ) and _reads_marks(early):
                name = early.name
                raise RecipeError(f"pass {name!r} stands before insert-qdq, which it needs; put insert-qdq before it")
            if isinstance(early, Calibrate) and any(spec.when == "static" for spec in _flowing(mark)):
                raise RecipeError(f"pass 'calibrate' stands before {mark.name}, whose scales it finds; put it behind")


def _behind_marks(passes: list[Pass], last: int) -> int:
    """The place behind the pass at `last` and the marking passes that follow it at once."""
    marks = ("insert-qdq", *VALUE_PASSES.values())
    while last + 1 < len(passes) and passes[last + 1].name in marks:
        last += 1
    return last + 1


def _first_reader_of_marks(passes: list[Pass]) -> int:
    return next((i for i, p in enumerate(passes) if _reads_marks(p)), len(passes))


def _reads_marks(pass_: Pass) -> bool:
    return pass_.rounds_weights or isinstance(pass_, Calibrate | ShareGlobalScale | BiasCorrection)
