"""From rules and shapes to a plan: who gets what, why, how large it is, and what does not fit."""

from __future__ import annotations

import io
import json
import re
from typing import Any

import pytest
import torch
from rich.console import Console

from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.ir.weights import WeightStore
from qcompile.recipe import Plan, Recipe, resolve

TEXT = """\
def main(ids: i64[batch, sequence], *,
    e: f32[64, 32] = "embed.weight",
    q0: f32[32, 32] = "layers.0.attn.q.weight",
    d0: f32[32, 48] = "layers.0.mlp.down.weight",
    u0: f32[32, 48] = "layers.0.mlp.up.weight",
    q1: f32[32, 32] = "layers.1.attn.q.weight",
    r1: f32[4, 32] = "layers.1.router.weight",
    x1: f32[4, 32, 16] = "layers.1.experts.up",
    y1: f32[4, 32, 16] = "layers.1.experts.down",
    h: f32[64, 32] = "head.weight",
):
    x = aten.embedding.default(e, ids)  # embed
    a = aten.linear.default(x, q0)  # layers.0.attn.q
    u = aten.matmul.default(a, u0)  # layers.0.mlp.up
    d = aten.linear.default(u, d0)  # layers.0.mlp.down
    b = aten.linear.default(d, q1)  # layers.1.attn.q
    v = aten.reshape.default(b, [-1, 32])  # layers.1
    r = aten.linear.default(v, r1)  # layers.1.router
    t = aten.topk.default(r, 1)  # layers.1.router
    i = operator.getitem(t, 1)  # layers.1.router
    f = aten.view.default(i, [-1])  # layers.1
    c = aten.unsqueeze.default(v, 1)  # layers.1.experts
    g = aten.index.Tensor(x1, [f])  # layers.1.experts
    m = aten.bmm.default(c, g)  # layers.1.experts
    k = aten.index.Tensor(y1, [f])  # layers.1.experts
    kt = aten.transpose.int(k, 1, 2)  # layers.1.experts
    n = aten.bmm.default(m, kt)  # layers.1.experts
    o = aten.view.default(n, [-1, 32])  # layers.1
    y = aten.linear.default(o, h)  # head
    return {"logits": y}
"""
NAMES = [
    *("embed", "layers.0.attn.q", "layers.0.mlp.up", "layers.0.mlp.down", "layers.1.attn.q", "layers.1.router"),
    *("layers.1.experts.up", "layers.1.experts.down", "head"),
]


class Unreadable:
    """A weight that fails when it is read."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, torch.float32

    def read(self) -> torch.Tensor:
        raise AssertionError("a plan reads no weights")


@pytest.fixture(scope="module")
def program() -> Program:
    parsed = Program.parse(TEXT)
    store = WeightStore()
    for key in parsed.weights:
        store.bind(key, Unreadable(parsed.weights.meta(key)[0]))
    parsed.weights = store
    return parsed


def weights(plan: Plan) -> dict[str, str | None]:
    return {s.name: None if s.weights is None else str(s.weights) for s in plan.sites if s.role != "embedding"}


def test_specs_land_on_the_stored_axes(program: Program) -> None:
    plan = resolve(program, Recipe(weights="int4 sym group=16", activations="int8 sym token dynamic"))
    assert [s.name for s in plan.sites] == NAMES
    assert weights(plan) == {
        "layers.0.attn.q": "int4 sym group=16",
        "layers.0.mlp.up": "int4 sym group=16 axis=0",  # [in, out]
        "layers.0.mlp.down": "int4 sym group=16",
        "layers.1.attn.q": "int4 sym group=16",
        "layers.1.router": None,
        "layers.1.experts.up": "int4 sym group=16 axis=1",  # [experts, in, out]
        "layers.1.experts.down": "int4 sym group=16",  # [experts, out, in]
        "head": None,
    }
    why = {s.name: s.why for s in plan.sites if s.weights is None}
    assert why == {"embed": "embeddings: null", "layers.1.router": "router: null", "head": "head: null"}
    assert {s.name: s.role for s in plan.sites if s.role != "linear"} == {
        "embed": "embedding",
        "layers.1.router": "router",
        "layers.1.experts.up": "expert",
        "layers.1.experts.down": "expert",
        "head": "head",
    }
    assert all((s.activations is None) == (s.weights is None) for s in plan.sites)


@pytest.mark.parametrize(
    ("spec", "up", "experts_up", "experts_down", "scales"),
    [
        ("int8 channel", "channel axis=1", "channel axis=0,2", "channel axis=0,1", [(1, 48), (4, 1, 16), (4, 32, 1)]),
        ("int8 channel axis=1", "channel", "channel axis=0,1", "channel axis=0,2", [(32, 1), (4, 32, 1), (4, 1, 16)]),
        ("int8 sym tensor", "tensor", "channel", "channel", [(1, 1), (4, 1, 1), (4, 1, 1)]),
        ("int8 sym block=16x8", "block=8x16", "block=8x16", "block=16x8", [(4, 3), (4, 4, 1), (4, 2, 2)]),
        ("int8 sym group=16 axis=0", "group=16", "group=16", "group=16 axis=1", [(32, 3), (4, 32, 1), (4, 2, 16)]),
    ],
)
def test_every_granularity_on_every_layout(
    program: Program, spec: str, up: str, experts_up: str, experts_down: str, scales: list[tuple[int, ...]]
) -> None:
    recipe = Recipe(rules=[{"match": "*.up", "weights": spec}, {"match": "*experts.down", "weights": spec}])
    plan = resolve(program, recipe)
    found = {s.name: s for s in plan.sites if s.weights is not None}
    names = ["layers.0.mlp.up", "layers.1.experts.up", "layers.1.experts.down"]
    assert [str(found[n].weights) for n in names] == [f"int8 sym {text}" for text in (up, experts_up, experts_down)]
    assert [found[n].weights.scale_shape(found[n].shape) for n in names] == scales  # type: ignore[union-attr]


def test_activation_whose_features_are_not_last() -> None:
    program = Program.parse(
        "def main(x: f32[n, 8, 1], i: i64[n], *, w: f32[4, 6, 8]):\n"
        "    g = aten.index.Tensor(w, [i])\n    y = aten.bmm.default(g, x)\n    return {'y': y}"
    )
    for spec, stored in {
        "int8 sym token dynamic": "int8 sym channel axis=0,2 dynamic",
        "int8 sym group=4 dynamic": "int8 sym group=4 axis=1 dynamic",
        "int8 sym tensor static": "int8 sym tensor static",
        "int8 sym channel static": "int8 sym channel axis=1 static",
    }.items():
        (site,) = resolve(program, Recipe(activations=spec)).sites
        assert str(site.activations) == stored
    with pytest.raises(RecipeError, match="w: its input: int8 sym block=2x2 dynamic has no meaning on an act"):
        resolve(program, Recipe(activations="int8 sym block=2x2 dynamic", rules=[{"match": "w", "weights": "int4"}]))


@pytest.mark.parametrize(
    ("rule", "decided"),
    [
        ({"match": "layers.0.attn.q"}, ["layers.0.attn.q"]),
        ({"match": "layers.0.attn.q.weight"}, ["layers.0.attn.q"]),
        ({"match": "layers.{0,7}.*"}, NAMES[1:4]),
        ({"match": "**.q"}, ["layers.0.attn.q", "layers.1.attn.q"]),
        ({"match": "layers.?.attn.q"}, ["layers.0.attn.q", "layers.1.attn.q"]),
        ({"match": "layers.1.experts"}, ["layers.1.experts.up", "layers.1.experts.down"]),
        ({"match": "layers.1.experts.down"}, ["layers.1.experts.down"]),
        ({"layers": "1-3"}, NAMES[4:8]),
        ({"layers": 0}, NAMES[1:4]),
        ({"operator": "matmul|bmm"}, ["layers.0.mlp.up", "layers.1.experts.up", "layers.1.experts.down"]),
        ({"operator": "aten.matmul.default"}, ["layers.0.mlp.up"]),
        ({"role": "router"}, ["layers.1.router"]),
        ({"role": "head"}, ["head"]),
        ({"match": "*.q", "layers": 1, "operator": "linear", "role": "linear"}, ["layers.1.attn.q"]),
    ],
)
def test_selectors(program: Program, rule: dict[str, Any], decided: list[str]) -> None:
    plan = resolve(program, Recipe(rules=[{**rule, "weights": "int8 sym channel"}]))
    assert [s.name for s in plan.sites if s.why == "rules.0"] == decided
    assert [s.name for s in plan.sites if s.weights is not None] == decided


def test_the_first_rule_decides_and_inherits(program: Program) -> None:
    recipe = Recipe(
        weights="int8 sym channel",
        activations="int8 sym token dynamic",
        rules=[
            {"match": "layers.0.attn.q", "activations": None},
            {"match": "layers.0.mlp.up", "weights": None},
            {"match": "layers.0.mlp.down", "weights": None, "activations": "int8 sym tensor dynamic"},
            {"match": "head", "weights": "int8 sym channel"},
            {"match": "layers.*.attn.q", "weights": None},
            {"match": "nowhere", "weights": None, "optional": True},
        ],
    )
    plan = resolve(program, recipe)
    found = {s.name: (str(s.weights), str(s.activations), s.why) for s in plan.sites}
    assert found["layers.0.attn.q"] == ("int8 sym channel", "None", "rules.0")
    assert found["layers.0.mlp.up"] == ("None", "None", "rules.1")
    assert found["layers.0.mlp.down"] == ("None", "int8 sym tensor dynamic", "rules.2")
    assert found["head"] == ("int8 sym channel", "int8 sym token dynamic", "rules.3")
    assert found["layers.1.attn.q"] == ("None", "None", "rules.4")
    assert found["layers.1.router"] == ("None", "None", "router: null")


def test_head_and_router_can_be_named(program: Program) -> None:
    plan = resolve(program, Recipe(weights="int4 sym channel", head="int8 sym channel", router="inherit"))
    found = {s.name: (str(s.weights), s.why) for s in plan.sites}
    assert found["head"] == ("int8 sym channel", "head: int8 sym channel")
    assert found["layers.1.router"] == ("int4 sym channel", "router: int4 sym channel")


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ([{"match": "layers.0.attn.k"}], "rules.0 matches nothing: no module or weight is called 'layers.0.attn.k' (d"),
        ([{"match": "lm_head"}], "rules.0 matches nothing: no module or weight is called 'lm_head'"),
        ([{"match": "layers.0"}], "rules.0 matches nothing: no module or weight is called 'layers.0'"),
        ([{"operator": "addmm"}], "rules.0 matches nothing: no product or lookup is 'addmm', they are bmm, emb"),
        ([{"layers": "7"}], "rules.0 matches nothing: layers 7 are none of 0, 1"),
        ([{"match": "head", "layers": "1"}], "layers 1 are none of its places, which have no layer"),
        ([{"match": "*.q", "role": "expert"}], "no place there has role 'expert', they are linear"),
        ([{"operator": "bmm", "layers": 0}], "rules.0 matches nothing: its selectors hold at no place together"),
        ([{"match": "*"}, {"match": "head"}], "rules.1 decides nowhere: rules 0 before it match all its places; mo"),
        ([{"match": "{a,{b}}"}], "rules.0: match '{a,{b}}' has braces that do not pair"),
        ([{"match": "{a"}], "rules.0: match '{a' has braces that do not pair"),
        ([{"layers": "a-b"}], "rules.0: layers 'a-b' is not written like 0-3,31"),
    ],
)
def test_rules_that_do_nothing_are_errors(program: Program, rules: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(program, Recipe(rules=[{**rule, "weights": None} for rule in rules]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_that_does_not_divide_comes_with_rules_to_paste(program: Program) -> None:
    recipe = Recipe(weights="int4 sym group=32")
    with pytest.raises(RecipeError) as caught:
        resolve(program, recipe)
    message = str(caught.value)
    assert message.startswith(
        "layers.0.mlp.down [32, 48]: int4 sym group=32 does not divide its input size 48 (nearest divisors 24 and 48), "
        'and 1 more; add rules: [{match: "layers.*.mlp.down", weights: int4 sym group=16}, {match: "layers.*.experts.d'
    )
    pasted = re.findall(r"(rules: .*)$", message)[0]
    mended = Recipe.parse(f"weights: int4 sym group=32\n{pasted}")
    found = weights(resolve(program, mended))
    assert found["layers.0.mlp.down"] == "int4 sym group=16"
    assert found["layers.1.experts.down"] == "int4 sym group=16"


def test_where_no_usual_group_fits_the_rule_to_paste_says_channel() -> None:
    odd = Program.parse(
        "def main(x: f32[2, 43], *, w: f32[6, 43]):\n    y = aten.linear.default(x, w)\n    return {'y': y}"
    )
    with pytest.raises(RecipeError) as caught:
        resolve(odd, Recipe(weights="int4 sym group=32"))
    message = "w [6, 43]: int4 sym group=32 does not divide its input size 43 (nearest divisors 1 and 43)"
    assert str(caught.value) == message + '; add rules: [{match: "w", weights: int4 sym channel}]'


def test_other_misfits(program: Program) -> None:
    with pytest.raises(RecipeError, match="; put first in rules: "):
        resolve(program, Recipe(rules=[{"match": "layers.0.mlp.down", "weights": "int4 sym group=32"}]))
    with pytest.raises(RecipeError, match=r"layers\.0\.attn\.q: block=5x5 does not divide axis 0"):
        resolve(program, Recipe(weights="int4 sym block=5x5"))
    with pytest.raises(RecipeError, match=r"axis=2 is none of \[out, in\]"):
        resolve(program, Recipe(weights="int4 sym channel axis=2"))
    with pytest.raises(RecipeError, match=r"layers\.0\.attn\.q: its input: group=5 does not divide"):
        resolve(program, Recipe(weights="int4 sym channel", activations="int8 sym group=5 dynamic"))


def test_sizes(program: Program) -> None:
    plan = resolve(program, Recipe(weights="int4 sym channel", head="int8 sym group=16"))
    site = next(s for s in plan.sites if s.name == "layers.0.mlp.down")
    assert (site.bits, site.bytes, site.float_bytes) == (4 + 32 / 48, 32 * 48 // 2 + 32 * 4, 32 * 48 * 4)
    assert plan.bytes_before == sum(program.weights.nbytes(key) for key in program.weights)
    assert plan.bytes_before - plan.bytes_after == sum(s.float_bytes - s.bytes for s in plan.sites)
    total = sum(s.bytes * 8 for s in plan.sites)
    elements = sum(s.float_bytes // 4 for s in plan.sites)
    assert plan.average_bits == pytest.approx(total / elements)


def test_a_tied_weight_is_counted_both_ways() -> None:
    tied = Program.parse(
        "def main(ids: i64[2, 3], *, e: f32[64, 32]):\n    x = aten.embedding.default(e, ids)\n"
        "    y = aten.linear.default(x, e)  # head\n    return {'logits': y}"
    )
    untouched = resolve(tied, Recipe(weights="int8 sym channel"))
    assert untouched.bytes_after == untouched.bytes_before == 64 * 32 * 4
    both = resolve(tied, Recipe(head="int8 sym channel"))
    assert both.bytes_after == 64 * 32 * 4 + 64 * 32 + 64 * 4


def test_plan_shows_itself(program: Program) -> None:
    plan = resolve(program, Recipe(weights="int4 sym channel"))
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(plan.table())
    text = console.export_text()
    assert "layers.1.experts.down" in text
    assert "head: null" in text
    data = json.loads(json.dumps(plan.to_dict()))
    assert data["sites"][1] == {
        "name": "layers.0.attn.q",
        "module": "layers.0.attn.q",
        "op": "linear",
        "role": "linear",
        "weight": "layers.0.attn.q.weight",
        "shape": [32, 32],
        "weights": "int4 sym channel",
        "activations": None,
        "outputs": None,
        "why": "default",
        "bits": 5.0,
        "bytes": 640,
    }
    assert data["average_bits"] == plan.average_bits


def test_obstacles_are_in_the_plan() -> None:
    computed = Program.parse(
        "def main(x: f32[2, 4], *, w: f32[6, 4]):\n    m = aten.mul.Tensor(w, 2.0)\n"
        "    y = aten.linear.default(x, m)  # a.b\n    return {'y': y}"
    )
    plan = resolve(computed, Recipe(weights="int4 sym channel"))
    assert plan.sites == ()
    assert plan.to_dict()["obstacles"] == [
        {"module": "a.b", "reason": "its weight is computed (mul, m) before it is multiplied"}
    ]
