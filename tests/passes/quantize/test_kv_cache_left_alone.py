"""What the cache is not stored as codes for, and says so; specs that no cache can have."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import parse_pass
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.kv_cache import QuantizeKVCache

K8 = "int8 sym token dynamic"

CACHE = """def main(x: f32[b, 2, s, 8], past_key_values_0_key: f32[b, 2, past, 8], past_key_values_0_value: f32[b, 2, past, 8]):
    k = aten.neg.default(x)  # attn
    keys = aten.cat.default([past_key_values_0_key, k], -2)  # attn
    values = aten.cat.default([past_key_values_0_value, x], -2)  # attn
    y = aten.scaled_dot_product_attention.default(x, keys, values)  # attn
    return {"y": y, "present_0_key": keys, "present_0_value": values}"""


LEFT: dict[str, tuple[str, str, str]] = {
    "the past is read": (
        'keys, values)  # attn\n    return {"y": y',
        'keys, values)  # attn\n    n = aten.neg.default(past_key_values_0_key)\n    return {"y": y, "n": n',
        "n reads the past apart from the new tokens",
    ),
    "new tokens first": (
        "[past_key_values_0_key, k]",
        "[k, past_key_values_0_key]",
        "present_0_key is cat keys, not the past with new tokens behind it",
    ),
    "nothing returned": ('"present_0_key": keys, ', "", "the program returns no present_0_key"),
    "new tokens twice": (
        "[past_key_values_0_key, k]",
        "[past_key_values_0_key, k, k]",
        "present_0_key is cat keys, not the past with new tokens behind it",
    ),
    "fewer features": (
        '"present_0_key": keys',
        '"present_0_key": part',
        "present_0_key is only a part of the features or heads",
    ),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name: str, left_alone: Callable[..., list[str]]) -> None:
    old, new, reason = LEFT[name]
    text = CACHE.replace(old, new)
    if "part" in new:
        text = text.replace("    values =", "    part = aten.slice.Tensor(keys, 3, 0, 4)\n    values =")
    assert left_alone(QuantizeKVCache(keys=K8), text) == [reason]


def test_codes_are_left_alone() -> None:
    program = Program.parse(CACHE)
    PassManager([QuantizeKVCache(keys=K8)]).run(program)
    before = str(program)
    (report,) = PassManager([QuantizeKVCache(keys=K8)]).run(program)
    assert str(program) == before
    (entry,) = report.skipped
    assert entry.where == "past_key_values_0_key"
    assert entry.what.startswith("it is i8[b, 2, past, 8], not float [batch, heads, tokens, features]")


def test_no_cache_is_said() -> None:
    program = Program.parse('def main(x: f32[2]):\n    y = aten.neg.default(x)\n    return {"y": y}')
    (report,) = PassManager([QuantizeKVCache(keys=K8)]).run(program)
    assert report.notes == ["the program has no cache: none of its inputs is called past_key_values_…"]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("int8 sym token", "quantize-kv-cache, keys: .* does not say when its scales are known; add static or dynamic"),
        (
            "int4 sym group=3 dynamic",
            "attn.key: group=3 does not divide .*, whose size is 8; the nearest divisors are 2 and 4",
        ),
        (
            "int4 sym group=4 axis=-2 dynamic",
            "attn.key: .*: a group of tokens would have to wait for the tokens to come",
        ),
        ("int4 sym group=4 axis=2 dynamic", "attn.key: .*: a group of tokens would have to wait"),
        ("int4 sym block=2x4 dynamic", "attn.key: .*: a group of tokens would have to wait"),
        ("int8 sym tensor dynamic", "attn.key: .*: its scale belongs to a call and not to a token"),
        ("int8 sym channel dynamic", "attn.key: .*: its scale belongs to a call and not to a token"),
        ("int8 sym channel axis=2 static", "attn.key: .*: axis 2 has another length at every call"),
        ("e2m1 group=4 scale=e4m3 dynamic", "attn.key: .*: its global_scale belongs to a call and not to a token"),
    ],
)
def test_scales_that_are_not_a_tokens_own(spec: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeKVCache(keys=spec).run(Program.parse(CACHE))


def test_prints_and_parses_back() -> None:
    pass_ = QuantizeKVCache(keys=K8, values="int4 asym group=4 dynamic")
    assert parse_pass(str(pass_)) == pass_
