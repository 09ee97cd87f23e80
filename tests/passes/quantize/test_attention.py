"""Rounded attention: the places, what is left alone, and numbers against an attention written out here."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report, parse_pass
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.attention import QuantizeAttention
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.kv_cache import QuantizeKVCache

aten = torch.ops.aten

K8 = "int8 sym token dynamic"
V4 = "int4 asym group=2 dynamic"
U8 = "uint8 token dynamic"

GROUPED = """def main(q: f32[b, 4, s, 8], k: f32[b, 2, t, 8], v: f32[b, 2, t, 8], m: bool[b, 1, s, t]):
    b = aten.sym_size.int(q, 0)
    t = aten.sym_size.int(k, 2)
    k5 = aten.unsqueeze.default(k, 2)  # attn
    kx = aten.expand.default(k5, [-1, 2, 2, -1, 8])  # attn
    kr = aten.reshape.default(kx, [b, 4, t, 8])  # attn
    v5 = aten.unsqueeze.default(v, 2)  # attn
    vx = aten.expand.default(v5, [-1, 2, 2, -1, 8])  # attn
    vr = aten.reshape.default(vx, [b, 4, t, 8])  # attn
    y = aten.scaled_dot_product_attention.default(q, kr, vr, m)  # attn
    return {"y": y}"""
"""Keys and values repeated for groups of queries."""


def run(pass_: QuantizeAttention, text: str) -> tuple[Program, Report]:
    program = Program.parse(text)
    (report,) = PassManager([pass_]).run(program)
    assert str(Program.parse(str(program), program.weights)) == str(program)
    return program, report


def test_keys_and_values_are_rounded_before_they_are_repeated() -> None:
    program, report = run(QuantizeAttention(q=K8, k=K8, v=V4), GROUPED)
    text = str(program)
    for x, role, spec in (("q", "query", K8), ("k", "key", K8), ("v", "value", V4)):
        assert f'qcompile.choose_qparams.default({x}, "{spec}")  # attn' in text
        assert text.count(f"{role}_dequantize") == 2
    assert "(query_dequantize, kr_1, vr_1, m)" in text
    assert [(entry.where, entry.what) for entry in report.rewritten] == [
        ("attn.query", f"q: {K8}"),
        ("attn.key", f"k: {K8}"),
        ("attn.value", f"v: {V4}"),
    ]


def test_what_else_reads_a_value_reads_it_as_it_was() -> None:
    text = GROUPED.replace('{"y": y}', '{"y": y, "kr": kr, "k": k}')
    program, _ = run(QuantizeAttention(k=K8), text)
    k = torch.randn(1, 2, 3, 8)
    out = program.run({"q": torch.randn(1, 4, 2, 8), "k": k, "v": k, "m": torch.ones(1, 1, 2, 3).bool()})
    assert torch.equal(out["k"], k)
    assert torch.equal(out["kr"], k.repeat_interleave(2, 1))


def test_one_value_with_one_spec_is_rounded_once() -> None:
    text = "def main(q: f32[b, 2, s, 8], x: f32[b, 2, t, 8]):\n"
    text += "    y = aten.scaled_dot_product_attention.default(q, x, x)  # a\n"
    text += "    z = aten.scaled_dot_product_attention.default(q, x, x, scale=1.0)  # b\n"
    text += '    return {"y": y, "z": z}'
    both, _ = run(QuantizeAttention(k=K8, v=K8), text)
    assert len(both.calls(torch.ops.qcompile.quantize.default)) == 1
    keys, _ = run(QuantizeAttention(k=K8), text)  # of one tensor read twice, only one reading is rounded
    (y, z) = keys.calls(aten.scaled_dot_product_attention.default)
    assert [a.name for a in y.args[:3]] == [a.name for a in z.args[:3]] == ["q", "key_dequantize", "x"]  # type: ignore[union-attr]


def fused(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    return torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, **options)


MASK = torch.randn(2, 1, 3, 5, generator=torch.Generator().manual_seed(3)) > -0.5
MASK[1, 0, 1] = False  # a query that sees nothing
FORMS: dict[str, tuple[str, tuple[int, ...], Any, dict[str, Any]]] = {
    "plain": ("", (4, 4), None, {}),
    "scaled": (", scale=0.7", (4, 4), None, {"scale": 0.7}),
    "boolean mask": (", m", (4, 4), MASK, {}),
    "additive mask": (", m", (4, 4), torch.randn(2, 4, 3, 5, dtype=torch.float64), {}),
    "minus infinity": (", m", (4, 4), torch.where(MASK, 0.0, -math.inf).double(), {}),
    "causal": (", None, 0.0, True", (4, 4), None, {"is_causal": True}),
    "grouped": (", enable_gqa=True", (4, 2), None, {"enable_gqa": True}),
    "grouped and masked": (", m, enable_gqa=True", (4, 1), MASK, {"enable_gqa": True}),
    "broadcast": ("", (4, 1), None, {}),
}


@pytest.mark.parametrize("form", FORMS)
def test_spelled_out_is_exact(form: str) -> None:
    argument, (heads, kv), mask, options = FORMS[form]
    of_mask = "" if mask is None else f", m: {'bool' if mask.dtype == torch.bool else 'f64'}[b, {mask.shape[1]}, s, t]"
    text = f"def main(q: f64[b, {heads}, s, 8], k: f64[b, {kv}, t, 8], v: f64[b, {kv}, t, 8]{of_mask}):\n"
    text += f"    y = aten.scaled_dot_product_attention.default(q, k, v{argument})  # attn\n"
    text += '    x = aten.transpose.int(y, 1, 2)\n    z = aten.reshape.default(x, [-1, 32])\n    return {"z": z}'
    program, report = run(QuantizeAttention(softmax=U8), text)
    assert [entry.what for entry in report.rewritten] == ["spelled out", f"softmax: {QuantSpec.parse(U8)}"]
    for node in program.calls(torch.ops.qcompile.dequantize.default):  # the same, but for the rounding
        program.replace(node, program.calls(aten._safe_softmax.default)[0])
    program.refresh()
    random = torch.Generator().manual_seed(0)
    q, k, v = (
        torch.randn(2, h, n, d, generator=random, dtype=torch.float64)
        for h, n, d in ((heads, 3, 8), (kv, 5, 8), (kv, 5, 8))
    )
    feeds = {"q": q, "k": k, "v": v} | ({} if mask is None else {"m": mask})
    if form == "broadcast":
        k, v = k.expand(-1, 4, -1, -1), v.expand(-1, 4, -1, -1)
    expected = fused(q, k, v, mask, **options).transpose(1, 2).reshape(-1, 32)
    assert not expected.isnan().any()
    assert (program.run(feeds)["z"] - expected).abs().max() <= 1e-13


class Joined(torch.nn.Module):
    """From [batch, tokens, heads, features] to [batch, tokens, heads · features]."""

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        return fused(x, x, x).transpose(1, 2).reshape(x.shape[0], -1, 32)


@pytest.mark.parametrize("specs", [{"q": K8}, {"softmax": U8}])
def test_views_of_the_result_still_work(specs: dict[str, str]) -> None:
    """The fused operator lays its result out as its queries are; so a reshape may be a view, and export makes it one."""
    x = torch.randn(2, 5, 4, 8)
    dynamic = ({0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC},)
    exported = torch.export.export(Joined(), (x,), dynamic_shapes=dynamic).run_decompositions({})
    program = Program.from_exported(exported)
    assert len(program.calls(aten.view.default)) == 1
    expected = program(x)
    PassManager([QuantizeAttention(**specs)]).run(program)
    assert 0 < (program(x) - expected).abs().max() < 0.03


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
def test_spelled_out_halves_are_computed_in_float32(dtype: str) -> None:
    text = f"def main(q: {dtype}[b, 4, s, 8], k: {dtype}[b, 4, t, 8], v: {dtype}[b, 4, t, 8]):\n"
    text += '    y = aten.scaled_dot_product_attention.default(q, k, v)  # attn\n    return {"y": y}'
    program, _ = run(QuantizeAttention(softmax=U8), text)
    (softmax,) = program.calls(aten._safe_softmax.default)
    assert softmax.meta["val"].dtype == torch.float32
    assert program.outputs["y"].meta["val"].dtype == {"f16": torch.float16, "bf16": torch.bfloat16}[dtype]


def test_what_drops_out_is_left_fused() -> None:
    text = GROUPED.replace("(q, kr, vr, m)", "(q, kr, vr, m, 0.1)")
    program, report = run(QuantizeAttention(softmax=U8), text)
    assert str(program) == str(Program.parse(text))
    (entry,) = report.skipped
    assert entry.where == "attn.softmax"
    assert "dropout_p=0.1" in entry.what


# ------------------------------------------------------------------------------------------- against transformers

SPECS = {"q": K8, "k": "int6 asym token dynamic", "v": V4, "softmax": "uint8 tensor dynamic"}


def rounded_attention(
    module: torch.nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' models call it, every operand through its spec."""

    def round_(x: Tensor, name: str) -> Tensor:
        return QuantSpec.parse(SPECS[name]).quantize(x).dequantize(x.dtype)

    query, key, value = round_(query, "q"), round_(key, "k"), round_(value, "v")
    key, value = (x.repeat_interleave(query.shape[1] // x.shape[1], 1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * options.get("scaling", query.shape[-1] ** -0.5)
    if (cap := options.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    scores = scores if attention_mask is None else scores + attention_mask
    if (sinks := options.get("s_aux")) is not None:
        scores = torch.cat([scores, sinks.view(1, -1, 1, 1).expand(*scores.shape[:3], 1)], -1)
    weights = scores.softmax(-1, dtype=None if cap is None else torch.float32)  # Gemma's own is float32
    weights = round_(weights[..., : key.shape[2]], "softmax").to(value.dtype)
    return (weights @ value).transpose(1, 2), None


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gpt_oss", "deepseek_v3", "gpt2"])
def test_numbers_are_those_of_an_attention_that_rounds(name: str, cached_decoder: Callable[..., Any]) -> None:
    from transformers import AttentionInterface, AttentionMaskInterface
    from transformers.masking_utils import eager_mask

    AttentionInterface.register("rounded", rounded_attention)
    AttentionMaskInterface.register("rounded", eager_mask)
    model, program = cached_decoder(name, torch.float64)
    ids = torch.randint(3, 64, (2, 9), generator=torch.Generator().manual_seed(1))
    exact = program(ids)
    before, model.config._attn_implementation = model.config._attn_implementation, "rounded"
    with torch.no_grad():
        expected = model(ids).logits
    model.config._attn_implementation = before
    (report,) = PassManager([QuantizeAttention(**SPECS)]).run(program)
    logits = program(ids)
    scale = expected.abs().max()
    assert (logits - expected).abs().max() / scale <= 1e-5
    assert (logits - exact).abs().max() / scale >= 1e-3
    assert report.skipped == []


def test_spelled_out_by_the_model(cached_decoder: Callable[..., Any]) -> None:
    _, program = cached_decoder("bloom")
    exact = program(ids := torch.randint(3, 64, (2, 9)))
    (report,) = PassManager([QuantizeAttention(q=K8, k=K8, v=K8, softmax=U8)]).run(program)
    assert len(report.rewritten) == 8
    assert report.skipped == []
    sources = [program.arg(n, "x") for n in program.calls(torch.ops.qcompile.choose_qparams.default)]
    assert {n.meta["val"].ndim for n in sources} == {4}  # heads apart, though bmm reads them in the batch
    assert 0 < (program(ids) - exact).abs().max() / exact.abs().max() < 0.05


# ------------------------------------------------------------------------------------------------------- and others


def test_static_scales_are_stored_under_their_role(cached_decoder: Callable[..., Any]) -> None:
    _, program = cached_decoder("qwen3")
    s8 = "int8 sym tensor static"
    specs = {
        "q": s8,
        "k": "int8 sym channel axis=1,-1 static",
        "v": "int8 asym tensor static",
        "softmax": "uint8 tensor static",
    }
    batches = [torch.randint(3, 64, (2, 7)), torch.randint(3, 64, (1, 9))]
    PassManager([QuantizeAttention(**specs), Calibrate()], batches=batches).run(program)
    stored = {
        key.removeprefix("model.layers.1.self_attn."): t for key, t in program.weights.items() if "layers.1" in key
    }
    shapes = {key: list(t.shape) for key, t in stored.items() if key.endswith(("scale", "zero_point"))}
    assert shapes == {
        "query.scale": [1, 1, 1, 1],
        "key.scale": [1, 2, 1, 8],
        "value.scale": [1, 1, 1, 1],
        "value.zero_point": [1, 1, 1, 1],
        "softmax.scale": [1, 1, 1, 1],
    }
    assert not program.calls(torch.ops.qcompile.choose_qparams.default)


def test_a_value_that_is_quantized_already_is_left_alone(cached_decoder: Callable[..., Any]) -> None:
    _, program = cached_decoder("mistral")
    passes = [QuantizeKVCache(keys=K8), QuantizeAttention(k=K8, v=K8)]
    _, report = PassManager(passes).run(program)
    assert [entry.where for entry in report.rewritten] == [f"model.layers.{i}.self_attn.value" for i in (0, 1)]
    assert [(entry.where, entry.what) for entry in report.skipped] == [
        ("model.layers.0.self_attn.key", f"key_dequantize is quantized already: {K8}"),
        ("model.layers.1.self_attn.key", f"key_dequantize_1 is quantized already: {K8}"),
    ]


def test_products_that_are_no_attention_are_reported(left_alone: Callable[..., list[str]]) -> None:
    text = "def main(x: f32[b, s, 8], y: f32[b, 8, t]):\n    z = aten.bmm.default(x, y)\n    return {'z': z}"
    assert left_alone(QuantizeAttention(q=K8), text) == [
        "a product of two activations with no softmax before or behind it"
    ]


def test_no_attention_is_said() -> None:
    _, report = run(QuantizeAttention(q=K8), "def main(x: f32[2]):\n    y = aten.neg.default(x)\n    return {'y': y}")
    assert report.notes == ["the program has no attention"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"k": "int8 sym token"},
            "quantize-attention, k: .* does not say when its scales are known; add static or dynamic",
        ),
        (
            {"q": "int8 sym group=3 dynamic"},
            "attn.query: group=3 does not divide axis 0 of shape .8., whose size is 8; the nearest divisors are 2 and 4",
        ),
        ({"v": "int8 sym group=4 axis=-2 dynamic"}, "attn.value: .* axis -2 is known at run time only; use token"),
        (
            {"softmax": "uint8 group=8 dynamic"},
            "attn.softmax: .* axis -1 is known at run time only; use token or tensor",
        ),
        ({"k": "int8 sym channel axis=2 static"}, "attn.key: .*: axis 2 has another length at every call; use tensor"),
    ],
)
def test_specs_that_cannot_hold(options: dict[str, str], message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        QuantizeAttention(**options).run(Program.parse(GROUPED))


def test_prints_and_parses_back() -> None:
    pass_ = QuantizeAttention(k=K8, softmax=U8)
    assert str(pass_) == f"quantize-attention(k={K8}, softmax={U8})"
    assert parse_pass(str(pass_)) == pass_
