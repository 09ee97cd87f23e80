"""Places beside linears: embeddings, convolutions, results, attention; what a plan says of each."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from rich.console import Console

from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.recipe import Plan, Recipe, resolve

TEXT = """\
def main(ids: i64[batch, sequence], places: i64[sequence], *,
    e: f32[64, 32] = "embed.weight",
    p: f32[48, 32] = "position.weight",
    c: f32[48, 32, 3] = "conv.weight",
    d: f32[48, 1, 3] = "depthwise.weight",
    w: f32[32, 48] = "layers.0.down.weight",
):
    x = aten.embedding.default(e, ids)  # embed
    r = aten.embedding.default(p, places)  # position
    s = aten.add.Tensor(x, r)
    t = aten.transpose.int(s, 1, 2)
    y = aten.conv1d.default(t, c, None, [1], [1])  # conv
    z = aten.conv1d.default(y, d, None, [1], [1], [1], 48)  # depthwise
    u = aten.transpose.int(z, 1, 2)
    v = aten.linear.default(u, w)  # layers.0.down
    o = aten.linear.default(v, e)  # head
    return {"logits": o}
"""


@pytest.fixture(scope="module")
def program() -> Program:
    return Program.parse(TEXT)


def specs(plan: Plan, field: str) -> dict[str, str]:
    return {s.name: str(spec) for s in plan.sites if (spec := getattr(s, field)) is not None}


def test_tables_are_quantized_by_rows_and_features(program: Program) -> None:
    assert (
        specs(resolve(program, Recipe(weights="int8 sym channel")), "weights").keys().isdisjoint({"embed", "position"})
    )
    for spec, scales in {"int8 sym channel": (64, 1), "int4 sym group=16": (64, 2), "int8 sym tensor": (1, 1)}.items():
        plan = resolve(program, Recipe(embeddings=spec))
        assert specs(plan, "weights") == {"embed": spec, "position": spec}
        site = plan.sites[0]
        assert (site.role, site.op, site.activations, site.why) == (
            "embedding",
            "embedding",
            None,
            f"embeddings: {spec}",
        )
        assert site.weights is not None
        assert site.weights.scale_shape(site.shape) == scales


def test_a_table_stored_the_other_way_round() -> None:
    program = Program.parse(
        "def main(i: i64[n], *, w: f32[8, 64]):\n    t = aten.t.default(w)\n"
        "    y = aten.embedding.default(t, i)\n    return {'y': y}"
    )
    for spec, stored in {"int8 channel": "int8 sym channel axis=1", "int4 group=4": "int4 sym group=4 axis=0"}.items():
        assert specs(resolve(program, Recipe(embeddings=spec)), "weights") == {"w": stored}


@pytest.mark.parametrize(
    ("rule", "decided"),
    [
        ({"role": "embedding"}, ["embed", "position"]),
        ({"operator": "embedding"}, ["embed", "position"]),
        ({"match": "position"}, ["position"]),
        ({"match": "embed"}, ["embed", "head"]),  # the head reads embed.weight
        ({"match": "embed", "role": "embedding"}, ["embed"]),
        ({"role": "convolution"}, ["conv", "depthwise"]),
        ({"operator": "conv1d"}, ["conv", "depthwise"]),
        ({"match": "*"}, ["embed", "position", "conv", "depthwise", "layers.0.down", "head"]),
    ],
)
def test_rules_select_them(program: Program, rule: dict[str, Any], decided: list[str]) -> None:
    plan = resolve(program, Recipe(rules=[{**rule, "weights": "int8 sym channel"}]))
    assert list(specs(plan, "weights")) == decided
    assert [s.name for s in plan.sites if s.why == "rules.0"] == decided


def test_a_rule_may_leave_a_table_alone_or_inherit(program: Program) -> None:
    rules = [{"match": "embed", "weights": None}, {"match": "position", "outputs": "int8 sym token dynamic"}]
    plan = resolve(program, Recipe(embeddings="int8 sym channel", outputs="int8 sym tensor dynamic", rules=rules))
    assert specs(plan, "weights") == {"position": "int8 sym channel"}
    assert specs(plan, "outputs")["position"] == "int8 sym token dynamic"
    assert "embed" not in specs(plan, "outputs")  # `outputs` is about products


def test_a_rule_about_inputs_of_embeddings_alone_is_refused(program: Program) -> None:
    rule = {"role": "embedding", "activations": "int8 sym token dynamic"}
    with pytest.raises(
        RecipeError, match=r"rules\.0 decides at embeddings alone, and those read integers; drop its act"
    ):
        resolve(program, Recipe(rules=[rule]))
    plan = resolve(program, Recipe(rules=[{**rule, "role": None, "match": "*"}]))
    assert "embed" not in specs(plan, "activations")


@pytest.mark.parametrize(
    ("spec", "stored", "scales"),
    [
        ("int8 sym channel", "int8 sym channel", (48, 1, 1)),
        ("int8 sym channel axis=1", "int8 sym channel axis=1", (1, 32, 1)),
        ("int4 sym group=16", "int4 sym group=16 axis=1", (48, 2, 3)),
        ("int8 sym tensor", "int8 sym tensor", (1, 1, 1)),
    ],
)
def test_weights_of_convolutions(program: Program, spec: str, stored: str, scales: tuple[int, ...]) -> None:
    plan = resolve(program, Recipe(weights=spec, rules=[{"match": "depthwise", "weights": None}]))
    site = next(s for s in plan.sites if s.name == "conv")
    assert str(site.weights) == stored
    assert site.weights is not None
    assert site.weights.scale_shape(site.shape) == scales


def test_what_does_not_fit_a_convolution_comes_with_a_rule(program: Program) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(program, Recipe(weights="int4 sym group=16"))
    message = "depthwise [48, 1, 3]: int4 sym group=16 does not divide its input size 1 (nearest divisors 1)"
    assert str(caught.value) == message + '; add rules: [{match: "depthwise", weights: int4 sym channel}]'
    with pytest.raises(RecipeError, match="conv: int4 sym block=16x16 has no meaning on a weight of 3 axes, output 0"):
        resolve(program, Recipe(weights="int4 sym block=16x16"))


def test_what_does_not_fit_a_table_comes_with_a_rule(program: Program) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve(program, Recipe(embeddings="int4 sym group=48"))
    assert str(caught.value) == (
        "embed [64, 32]: int4 sym group=48 does not divide its feature size 32 (nearest divisors 32), and 1 more; "
        'add rules: [{match: "embed", role: embedding, weights: int4 sym group=32}, '
        '{match: "position", role: embedding, weights: int4 sym group=32}]'
    )


def test_inputs_and_results_on_the_axes_they_have(program: Program) -> None:
    for spec, stored in {
        "int8 sym token dynamic": "int8 sym channel axis=0,2 dynamic",
        "int8 sym tensor static": "int8 sym tensor static",
        "int8 sym channel static": "int8 sym channel axis=1 static",
        "int8 sym group=16 dynamic": "int8 sym group=16 axis=1 dynamic",
    }.items():
        plan = resolve(program, Recipe(weights="int8 sym channel", activations=spec, outputs=spec))
        for field in ("activations", "outputs"):
            found = specs(plan, field)
            assert found == {"conv": stored, "depthwise": stored, "layers.0.down": spec}  # a float head has neither


def test_float_weights_have_float_results(program: Program) -> None:
    recipe = Recipe(
        weights="int8 sym channel",
        outputs="int8 sym tensor dynamic",
        head="int8 sym channel",
        rules=[
            {"match": "conv", "weights": None},
            {"match": "depthwise", "weights": None, "outputs": "int4 sym tensor dynamic"},
            {"match": "layers.*", "outputs": None},
        ],
    )
    assert specs(resolve(program, recipe), "outputs") == {
        "depthwise": "int4 sym tensor dynamic",
        "head": "int8 sym tensor dynamic",
    }


def test_sizes_of_a_tied_table(program: Program) -> None:
    before = resolve(program, Recipe()).bytes_before
    table, codes = 64 * 32 * 4, 64 * 32 + 64 * 4
    positions = 48 * 32 * 4 - (48 * 32 + 48 * 4)
    both = Recipe(embeddings="int8 sym channel", head="int8 sym channel")
    assert resolve(program, both).bytes_after == before - positions - table + codes
    float_head = Recipe(embeddings="int8 sym channel")
    assert resolve(program, float_head).bytes_after == before - positions + codes
    other_head = Recipe(embeddings="int8 sym channel", head="int4 sym channel")
    assert resolve(program, other_head).bytes_after == before - positions - table + codes + 64 * 32 // 2 + 64 * 4


@pytest.mark.parametrize(
    ("weight", "reason"),
    [
        ("f32[0, 8]", "its weight 'w' [0, 8] has no elements"),
        ("i32[4, 8]", "its weight 'w' torch.int32 and no float"),
    ],
)
def test_what_cannot_be_quantized_says_so(weight: str, reason: str) -> None:
    text = f"def main(i: i64[n], *, w: {weight}):\n    y = aten.embedding.default(w, i)\n    return {{'y': y}}"
    (site,) = resolve(Program.parse(text), Recipe(embeddings="int8 sym channel")).sites
    assert (site.weights, site.why) == (None, reason.replace("'w' torch", "'w' is torch"))


def test_a_product_with_nothing_stays_as_it_is() -> None:
    text = "def main(x: f32[n, 8], *, w: f32[0, 8]):\n    y = aten.linear.default(x, w)\n    return {'y': y}"
    (site,) = resolve(Program.parse(text), Recipe(weights="int4 sym group=3", activations="int8 dynamic")).sites
    assert (site.weights, site.activations, site.why) == (None, None, "its weight 'w' [0, 8] has no elements")


def test_the_table_of_a_plan(program: Program) -> None:
    plain = shown(resolve(program, Recipe(weights="int8 sym channel")))
    assert "outputs" not in plain
    assert "over 4 products and 2 embeddings" in plain
    assert "embeddings: null" in plain
    assert "outputs" in shown(resolve(program, Recipe(weights="int8 sym channel", outputs="int8 sym tensor dynamic")))


ATTENTION = """\
def main(q: f32[batch, 2, sequence, 4], k: f32[batch, 2, sequence, 4], v: f32[batch, 2, sequence, 4], *, w: f32[4, 4]):
    a = aten.scaled_dot_product_attention.default(q, k, v)  # layers.0.attention
    y = aten.linear.default(a, w)  # layers.0.out
    return {"y": y}
"""


def test_attention_has_rows_of_its_own() -> None:
    program = Program.parse(ATTENTION)
    before = str(program)
    plan = resolve(program, Recipe(weights="int8 sym channel", attention={"kv": "int8 sym token dynamic"}))
    assert str(program) == before
    assert [v.field for v in plan.values] == ["attention"] * 2
    assert all(v.what is not None and "int8 sym token dynamic" in v.what for v in plan.values)
    assert all(v.name.startswith("layers.0.attention") for v in plan.values)
    assert [row["why"] for row in plan.to_dict()["values"]] == ["recipe"] * 2
    assert "attention" in shown(plan)
    assert resolve(program, Recipe(weights="int8 sym channel")).values == ()


def shown(plan: Plan) -> str:
    console = Console(width=220, record=True, file=io.StringIO())
    console.print(plan.table())
    return console.export_text()


def test_a_plan_reads_no_weight() -> None:
    program = Program.parse(ATTENTION)

    class Unreadable:
        shape, dtype = (4, 4), torch.float32

        def read(self) -> torch.Tensor:
            raise AssertionError("a plan reads no weights")

    program.weights.bind("w", Unreadable())
    recipe = Recipe(weights="int8 sym channel", outputs="int8 dynamic", attention="int8 sym token dynamic")
    assert len(resolve(program, recipe).values) == 3
