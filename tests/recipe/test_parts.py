"""Fields of several specs, attention and the cache: short forms, printing, and changing a part."""

from __future__ import annotations

from typing import Any

import pytest

from qcompile.errors import RecipeError
from qcompile.recipe import Recipe

K8, V4 = "int8 sym token dynamic", "int4 sym token dynamic"


@pytest.mark.parametrize(
    ("given", "parts", "printed"),
    [
        (None, {}, None),
        (K8, {"q": K8, "k": K8, "v": K8}, K8),
        ({"qkv": K8}, {"q": K8, "k": K8, "v": K8}, K8),
        ({"kv": K8}, {"k": K8, "v": K8}, {"k": K8, "v": K8}),
        ({"kv": K8, "v": V4}, {"k": K8, "v": V4}, {"k": K8, "v": V4}),
        ({"v": V4, "qkvs": K8}, {"q": K8, "k": K8, "v": V4, "softmax": K8}, {"q": K8, "k": K8, "v": V4, "softmax": K8}),
        ({"qkvs": K8, "kv": None}, {"q": K8, "softmax": K8}, {"q": K8, "softmax": K8}),
        ({"element": "int8", "when": "dynamic"}, None, {"element": "int8", "when": "dynamic"}),
        ({"k": {"element": "int8", "when": "static"}}, None, {"k": {"element": "int8", "when": "static"}}),
        ({"q": None, "softmax": None}, {}, None),
    ],
)
def test_attention(given: Any, parts: dict[str, str] | None, printed: Any) -> None:
    recipe = Recipe(attention=given)
    if parts is not None:
        assert {name: spec for name, spec in recipe.attention.specs.items() if spec is not None} == parts
    assert recipe.to_dict().get("attention") == printed
    assert Recipe.parse(str(recipe)) == recipe
    assert Recipe.load(recipe.to_dict()) == recipe


@pytest.mark.parametrize(
    ("given", "printed"),
    [
        (None, None),
        (K8, K8),
        ({"keys": K8, "values": K8}, K8),
        ({"keys": K8}, {"keys": K8}),
        ({"keys": K8, "values": V4}, {"keys": K8, "values": V4}),
    ],
)
def test_cache(given: Any, printed: Any) -> None:
    recipe = Recipe(kv_cache=given)
    assert recipe.to_dict().get("kv_cache") == printed
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("assignments", "attention", "cache"),
    [
        (["kv_cache.keys.bits=4"], None, {"keys": V4, "values": K8}),
        (["kv_cache.bits=4"], None, V4),
        (["kv_cache=null"], None, None),
        (["kv_cache.values=null"], None, {"keys": K8}),
        (["attention.k=null"], {"v": V4}, K8),
        (["attention.k.bits=4"], {"k": V4, "v": V4}, K8),
        (["attention.kv.symmetry=asym"], {"k": "int8 asym token dynamic", "v": "int4 asym token dynamic"}, K8),
        ([f"attention.qkv={K8}"], K8, K8),
        ([f"attention.qkv={K8}", "attention.bits=4"], V4, K8),
        ([f"attention={K8}", "attention.softmax=uint8 tensor static"], None, K8),
    ],
)
def test_override(assignments: list[str], attention: Any, cache: Any) -> None:
    recipe = Recipe(attention={"k": K8, "v": V4}, kv_cache=K8).override(assignments)
    data = recipe.to_dict()
    assert data.get("kv_cache") == cache
    if attention is not None:
        assert data["attention"] == attention
    assert Recipe.parse(str(recipe)) == recipe


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        (
            "attention.q.bits=4",
            "attention.q is null, which has no fields; set it first, as attention.q=int8 sym dynamic",
        ),
        (
            "attention.kk=null",
            "attention field 'kk' is unknown (did you mean 'k'?); the fields there are q, k, v, softmax",
        ),
        ("attention.kv.gruop=4", "attention.k: unknown spec field 'gruop' (did you mean 'group'?)"),
        ("kv_cache.key=null", "kv_cache: unknown spec field 'key'"),
        ("kv_cache.key=null", "; the parts of kv_cache are keys, values"),
        ("kv_cache.keys.bits.x=1", "kv_cache.keys: unknown spec field 'bits.x'"),
    ],
)
def test_wrong_overrides(assignment: str, message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        Recipe(attention={"k": K8, "v": V4}, kv_cache=K8).override([assignment])
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_part_of_nothing() -> None:
    with pytest.raises(
        RecipeError, match=r"kv_cache field 'bits' is unknown; .* keys, values; kv_cache is null, so set it"
    ):
        Recipe().override(["kv_cache.bits=4"])
    assert Recipe().override([f"kv_cache.keys={K8}"]).to_dict() == {"kv_cache": {"keys": K8}}
