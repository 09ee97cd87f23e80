"""Static scales from calibration data: those of the float program, whatever the batches."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.numerics.observers import Observer
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.plain import without_rounding
from qcompile.passes.quantize.rtn import RTN
from qcompile.recipe import Recipe, pipeline

Decoder = Callable[..., tuple[torch.nn.Module, Program]]

TEXT = """def main(input_ids: i64[batch, sequence], *, e: f32[16, 8], w: f32[8, 8], v: f32[8, 8], h: f32[16, 8]):
    x = aten.embedding.default(e, input_ids)  # embed
    y = aten.linear.default(x, w)  # a
    g = aten.relu.default(y)  # act
    z = aten.linear.default(g, v)  # b
    o = aten.linear.default(z, h)  # head
    return {"logits": o}"""
BATCHES = [torch.arange(12).view(2, 6), torch.arange(10).flip(0).view(2, 5)]


def calibrated(spec: str, batches: list[torch.Tensor] | None = None) -> tuple[Program, Report]:
    program = Program.parse(TEXT)
    passes = [InsertQDQ(weights="int8 sym channel", activations=spec), Calibrate()]
    reports = PassManager(passes, batches=BATCHES if batches is None else batches).run(program)
    return program, reports[-1]


@pytest.mark.parametrize(
    "spec",
    ["int8 asym static", "int8 sym static", "uint8 asym channel static", "int8 asym static percentile=99"],
)
def test_scales_are_those_of_the_float_program(spec: str) -> None:
    program, report = calibrated(spec)
    plain = Program.parse(TEXT)
    observer = Observer(QuantSpec.parse(spec))
    for batch in BATCHES:
        x = plain.weights["e"][batch]
        observer.observe(torch.relu(x @ plain.weights["w"].t()))
    scale, zero_point, _ = observer.qparams()
    assert torch.allclose(program.weights["b.input.scale"], scale, rtol=1e-5)
    if zero_point is None:
        assert "b.input.zero_point" not in program.weights
    else:
        assert (program.weights["b.input.zero_point"].int() - zero_point.int()).abs().max() <= 1
    assert [e.where for e in report.rewritten] == ["a.input", "b.input"]
    assert report.notes[0] == "2 activations watched"
    assert report.notes[1].endswith("4 samples, 22 tokens")


def test_golden() -> None:
    program, report = calibrated("int8 asym tensor static")
    PassManager([RTN()]).run(program)
    assert (
        str(program)
        == """\
def main(
    input_ids: i64[batch, sequence],
    *,
    e: f32[16, 8],
    h: f32[16, 8],
    a_input_scale: f32[1, 1, 1] = "a.input.scale",
    a_input_zero_point: i8[1, 1, 1] = "a.input.zero_point",
    b_input_scale: f32[1, 1, 1] = "b.input.scale",
    b_input_zero_point: i8[1, 1, 1] = "b.input.zero_point",
    w_codes: i8[8, 8] = "w.codes",
    w_scale: f32[8, 1] = "w.scale",
    v_codes: i8[8, 8] = "v.codes",
    v_scale: f32[8, 1] = "v.scale",
):
    x: f32[batch, sequence, 8] = aten.embedding.default(e, input_ids)  # embed
    dequantize: f32[8, 8] = qcompile.dequantize.default(w_codes, w_scale, None, "int8 sym channel")  # a
    quantize_2: i8[batch, sequence, 8] = qcompile.quantize.default(x, a_input_scale, a_input_zero_point, "int8 asym tensor static")  # a
    dequantize_2: f32[batch, sequence, 8] = qcompile.dequantize.default(quantize_2, a_input_scale, a_input_zero_point, "int8 asym tensor static")  # a
    y: f32[batch, sequence, 8] = aten.linear.default(dequantize_2, dequantize)  # a
    g: f32[batch, sequence, 8] = aten.relu.default(y)  # act
    dequantize_1: f32[8, 8] = qcompile.dequantize.default(v_codes, v_scale, None, "int8 sym channel")  # b
    quantize_3: i8[batch, sequence, 8] = qcompile.quantize.default(g, b_input_scale, b_input_zero_point, "int8 asym tensor static")  # b
    dequantize_3: f32[batch, sequence, 8] = qcompile.dequantize.default(quantize_3, b_input_scale, b_input_zero_point, "int8 asym tensor static")  # b
    z: f32[batch, sequence, 8] = aten.linear.default(dequantize_3, dequantize_1)  # b
    o: f32[batch, sequence, 16] = aten.linear.default(z, h)  # head
    return {"logits": o}"""
    )
    ranges = report.measured["b.input"]
    assert ranges["low"] == 0.0  # behind a relu
    assert ranges["high"] > 0.0


def test_the_order_of_batches_does_not_matter() -> None:
    one, _ = calibrated("int8 asym static percentile=99.9")
    other, _ = calibrated("int8 asym static percentile=99.9", BATCHES[::-1])
    assert torch.equal(one.weights["b.input.scale"], other.weights["b.input.scale"])


def test_dynamic_activations_and_weights_are_left_to_others() -> None:
    program = Program.parse(TEXT)
    passes = [InsertQDQ(weights="int8 sym channel", activations="int8 sym token dynamic"), Calibrate()]
    reports = PassManager(passes, batches=BATCHES).run(program)
    assert reports[-1].notes == ["no activation is static; nothing to calibrate"]
    assert len(program.calls(torch.ops.qcompile.choose_qparams.default)) == 4


def test_errors() -> None:
    program = Program.parse(TEXT)
    passes = [InsertQDQ(activations="int8 sym static"), Calibrate()]
    with pytest.raises(QCompileError, match="pass 'calibrate' needs calibration data and none is given; give data="):
        PassManager(passes).run(program)
    with pytest.raises(QCompileError, match="the calibration data has no tokens; give data= with at least one batch"):
        calibrated("int8 sym static", [])
    with pytest.raises(QCompileError, match="needs calibration data"):
        Calibrate().run(program)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_names_module_and_batch(value: float) -> None:
    program = Program.parse(TEXT)
    broken = program.weights["e"].clone()
    broken[15, 3] = value
    program.weights["e"] = broken
    batches = [BATCHES[0], torch.full((1, 2), 15)]
    with pytest.raises(QCompileError) as caught:
        PassManager([InsertQDQ(activations="int8 sym static"), Calibrate()], batches=batches).run(program)
    assert str(caught.value).startswith("input of a in calibration samples 2-2: int8 sym tensor static: ")
    assert "nan or infinity" in str(caught.value)


def test_without_rounding_is_the_float_program() -> None:
    program, plain = Program.parse(TEXT), Program.parse(TEXT)
    PassManager([InsertQDQ(weights="int2 sym channel", activations="int4 sym token dynamic")]).run(program)
    before = str(program)
    assert str(without_rounding(program)) == str(plain)
    assert str(program) == before


CACHED = """def main(
    input_ids: i64[batch, sequence],
    past_key_values_0_key: f32[batch, 1, past, 8],
    past_key_values_0_value: f32[batch, 1, past, 8],
    *, e: f32[16, 8], k: f32[8, 8], v: f32[8, 8], o: f32[8, 8], h: f32[16, 8],
):
    x = aten.embedding.default(e, input_ids)  # embed
    kx = aten.linear.default(x, k)  # k
    ky = aten.unsqueeze.default(kx, 1)
    vx = aten.linear.default(x, v)  # v
    vy = aten.unsqueeze.default(vx, 1)
    q = aten.unsqueeze.default(x, 1)
    kz = aten.cat.default([past_key_values_0_key, ky], 2)  # attention
    vz = aten.cat.default([past_key_values_0_value, vy], 2)  # attention
    a = aten.scaled_dot_product_attention.default(q, kz, vz)  # attention
    b = aten.squeeze.dim(a, 1)
    y = aten.linear.default(b, o)  # o
    z = aten.linear.default(y, h)  # head
    return {"logits": z, "present_0_key": kz, "present_0_value": vz}"""


@pytest.mark.parametrize("cache", [{"kv_cache": "int2 sym token dynamic"}, {"kv_cache": "int4 sym tensor static"}])
def test_a_cache_of_codes_is_not_rounded_while_it_is_watched(cache: dict[str, str]) -> None:
    recipe = {"weights": "int8 sym channel", "activations": "int8 sym tensor static", "passes": ["insert-qdq"]}
    float_cache, program = Program.parse(CACHED), Program.parse(CACHED)
    PassManager(pipeline(Recipe.load(recipe)), batches=BATCHES).run(float_cache)
    PassManager(pipeline(Recipe.load(recipe | cache)), batches=BATCHES).run(program)
    assert torch.equal(program.weights["o.input.scale"], float_cache.weights["o.input.scale"])
    assert not program.calls(torch.ops.qcompile.choose_qparams.default) or "dynamic" in cache["kv_cache"]
    if "static" in cache["kv_cache"]:
        plain = Program.parse(CACHED)
        keys = torch.cat([(plain.weights["e"][ids] @ plain.weights["k"].t()).flatten() for ids in BATCHES])
        assert torch.allclose(program.weights["attention.key.scale"], keys.abs().max() / 7.5, rtol=1e-5)


def test_static_int8_on_a_decoder_is_near_the_float_one(tiny_decoder: Decoder) -> None:
    _, program = tiny_decoder("llama", layers=2)
    ids = torch.arange(28).view(2, 14)
    before = program(ids)
    recipe = Recipe(weights="int8 sym channel", activations="int8 asym tensor static", passes=("insert-qdq",))
    PassManager(pipeline(recipe), batches=[ids, ids + 3]).run(program)
    assert not program.calls(torch.ops.qcompile.choose_qparams.default)
    assert 0 < (program(ids) - before).abs().max() / before.abs().max() < 0.05
