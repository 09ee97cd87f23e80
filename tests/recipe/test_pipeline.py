"""From recipes to passes: what is added where, and orders that cannot work."""

from __future__ import annotations

import pytest

from qcompile.errors import RecipeError
from qcompile.pass_base import parse_pass
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.recipe import Recipe, pipeline

W4 = "insert-qdq(weights=int4 sym group=32)"
STATIC = "insert-qdq(weights=int8 sym channel, activations=int8 asym tensor static)"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("{}", ["raise-norms"]),
        ("weights: int4 sym group=32", ["raise-norms", W4, "rtn"]),
        ("weights: {element: int4, group: 32}", ["raise-norms", W4, "rtn"]),
        ("{weights: int4 sym group=32, passes: [rtn]}", [W4, "rtn"]),
        ("{weights: int4 sym group=32, passes: [rtn, raise-norms]}", [W4, "rtn", "raise-norms"]),
        ("{weights: int4 sym group=32, passes: [insert-qdq, raise-norms]}", [W4, "raise-norms", "rtn"]),
        (
            "{weights: int8 sym channel, activations: int8 asym tensor static}",
            ["raise-norms", STATIC, "calibrate", "rtn"],
        ),
        (
            "{weights: int8 sym channel, activations: int8 asym tensor static, passes: [raise-norms, rtn, calibrate]}",
            ["raise-norms", STATIC, "rtn", "calibrate"],
        ),
        (
            "activations: int8 sym token dynamic",
            ["raise-norms", "insert-qdq(activations=int8 sym token dynamic)"],
        ),
        ("head: int8 sym channel", ["raise-norms", "insert-qdq(head=int8 sym channel)", "rtn"]),
        (
            "rules: [{match: 'a,b', weights: int8 sym channel}]",
            ["raise-norms", "insert-qdq(rules=[{match: 'a,b', weights: int8 sym channel}])", "rtn"],
        ),
        (f"passes: ['{W4}']", [W4, "rtn"]),
        ("passes: ['insert-qdq(activations=int8 static)']", ["insert-qdq(activations=int8 static)", "calibrate"]),
    ],
)
def test_pipeline(text: str, expected: list[str]) -> None:
    passes = pipeline(Recipe.parse(text))
    assert [str(p) for p in passes] == expected
    assert [parse_pass(str(p)) for p in passes] == passes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("weights: int4 simm", "weights: unknown word 'simm'"),
        ("weights: {element: int4, gruop: 3}", "weights: unknown spec field 'gruop'"),
        ("weights: int4 sym token dynamic", "weights: int4 sym token dynamic is for activations"),
        ("activations: int8 sym", "activations: int8 sym channel does not say when its scales are known"),
        ("rules: [{match: a, weights: int9}]", "rules.0.weights: unknown element 'int9'"),
        ("rules: [{match: a, activations: int8}]", "rules.0.activations: int8 sym channel does not say when"),
        ("passes: [raise-norm]", "passes.0: pass 'raise-norm' does not exist; did you mean 'raise-norms'?"),
        ("passes: [rtn(x=1)]", "passes.0: pass 'rtn' has no option 'x'"),
        ("{weights: int4, passes: [rtn, insert-qdq]}", "pass 'rtn' stands before insert-qdq"),
        ("{weights: int4, passes: [insert-qdq, insert-qdq]}", "insert-qdq is listed twice"),
        ("{weights: int4, passes: ['insert-qdq(head=int8)']}", "insert-qdq has options and the recipe has specs"),
        ("passes: ['insert-qdq(rules=[{mach: x}])']", "passes.0: pass 'insert-qdq', option rules.0"),
    ],
)
def test_what_cannot_be_carried_out_is_named(text: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(text).check()
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_insertion_round_trips_with_rules() -> None:
    text = "insert-qdq(weights=int4 sym, rules=[{match: lm_head, weights: null}, {layers: 3, activations: null}])"
    parsed = parse_pass(text)
    assert isinstance(parsed, InsertQDQ)
    assert [rule.weights for rule in parsed.rules] == [None, "inherit"]
    assert str(parsed) == text
