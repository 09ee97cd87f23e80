"""From recipes to passes: what is added where, and orders that cannot work."""

from __future__ import annotations

import pytest

from qcompile.errors import RecipeError
from qcompile.pass_base import parse_pass
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.recipe import Recipe, pipeline

W4 = "insert-qdq(weights=int4 sym group=32)"
K8, S8 = "int8 sym token dynamic", "int8 sym tensor static"
ATTENTION = f"quantize-attention(q={K8}, k={K8}, v={K8})"
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
        ("embeddings: int8 sym channel", ["raise-norms", "insert-qdq(embeddings=int8 sym channel)", "rtn"]),
        (
            "outputs: int8 sym tensor static",
            ["raise-norms", "insert-qdq(outputs=int8 sym tensor static)", "calibrate"],
        ),
        (
            "rules: [{role: convolution, outputs: int8 sym tensor static}]",
            [
                "raise-norms",
                "insert-qdq(rules=[{role: convolution, outputs: int8 sym tensor static}])",
                "calibrate",
            ],
        ),
        (
            f"{{weights: int4 sym group=32, attention: {{kv: {K8}}}, kv_cache: {K8}}}",
            [
                "raise-norms",
                W4,
                f"quantize-kv-cache(keys={K8}, values={K8})",
                f"quantize-attention(k={K8}, v={K8})",
                "rtn",
            ],
        ),
        (
            f"{{weights: int4 sym group=32, attention: {{q: {S8}, softmax: uint8 tensor static}}, passes: [rtn]}}",
            [W4, f"quantize-attention(q={S8}, softmax=uint8 tensor static)", "calibrate", "rtn"],
        ),
        (f"kv_cache: {{values: {S8}}}", ["raise-norms", f"quantize-kv-cache(values={S8})", "calibrate"]),
        ("attention: {element: int8, when: dynamic}", ["raise-norms", ATTENTION]),
        (f"{{attention: {K8}, passes: [quantize-attention, raise-norms]}}", [ATTENTION, "raise-norms"]),
        (f"passes: ['quantize-attention(k={S8})']", [f"quantize-attention(k={S8})", "calibrate"]),
        (
            f"{{activations: {S8}, attention: {S8}, passes: [insert-qdq, raise-norms, quantize-attention]}}",
            [
                f"insert-qdq(activations={S8})",
                "raise-norms",
                f"quantize-attention(q={S8}, k={S8}, v={S8})",
                "calibrate",
            ],
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
        ("rules: [{match: a, weights: int9}]", "rules.0.weights: integer elements have 1 to 8 bits, not 9"),
        ("rules: [{match: a, activations: int8}]", "rules.0.activations: int8 sym channel does not say when"),
        ("outputs: int8 sym", "outputs: int8 sym channel does not say when its scales are known"),
        (
            "weights: int8 sym stack=0",
            "weights: int8 sym channel stack=0: which axis stacks experts is read off the prog",
        ),
        ("embeddings: int8 token dynamic", "embeddings: int8 sym token dynamic is for activations"),
        ("attention: int8 sym", "attention.q: int8 sym channel does not say when its scales are known"),
        ("kv_cache: {keys: {element: int9}}", "kv_cache.keys: integer elements have 1 to 8 bits, not 9"),
        ("rules: [{match: a, outputs: int8}]", "rules.0.outputs: int8 sym channel does not say when"),
        (
            f"{{attention: {K8}, passes: ['quantize-attention(k={K8})']}}",
            "quantize-attention has options and the recipe",
        ),
        (f"{{kv_cache: {K8}, passes: [quantize-kv-cache, quantize-kv-cache]}}", "quantize-kv-cache is listed twice"),
        (
            f"{{attention: {S8}, passes: [calibrate, quantize-attention]}}",
            "pass 'calibrate' stands before quantize-att",
        ),
        ("passes: ['quantize-attention(k=int8)']", "quantize-attention, k: int8 sym channel does not say when"),
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
    assert [rule.outputs for rule in parsed.rules] == ["inherit", "inherit"]
    assert str(parsed) == text
