"""Passes that round from statistics: each method does on a model what it does on one matrix, and never worse than RTN."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.calibration.engine import run_segments
from qcompile.calibration.worker import Setup
from qcompile.errors import RecipeError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.numerics import QuantSpec
from qcompile.numerics.qtensor import quantize_tensor
from qcompile.pass_base import Pass, parse_pass
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.plain import without_rounding
from qcompile.passes.round.queries import made_for_scores
from qcompile.passes.round.rounding import Rounding
from qcompile.rounding import (
    GPFQ,
    GPTAQ,
    GPTQ,
    AwqClip,
    FloatTarget,
    MagR,
    Method,
    Nearest,
    Qronos,
    Statistics,
    Stored,
    round_matrix,
)

DATA = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))
SPEC = "int3 sym group=16"
METHODS: list[tuple[str, Method, dict[str, Any]]] = [
    ("gptq", GPTQ(0.01, "act"), {}),
    ("gptq(act_order=group, static_groups=false)", GPTQ(0.01, "group"), {"groups": "running"}),
    ("gptq(damping=0.1, target=float, act_order=false)", FloatTarget(0.1, "none"), {}),
    ("gptaq(alpha=0.5)", GPTAQ(0.01, "act", 0.5), {}),
    ("gpfq", GPFQ("act"), {}),
    ("qronos(alpha=1e-5)", Qronos("act", 1e-5), {}),
    ("awq-clip(tried=5, queries_keys=true)", Nearest(), {"clip": AwqClip(20, 5)}),
    ("gptq(magr=0.003)", GPTQ(0.01, "act"), {"shrink": MagR(0.003)}),
]


def marked(program: Program, spec: str = SPEC) -> Program:
    InsertQDQ(weights=spec).run(program)
    return program


def made(text: str) -> Rounding:
    pass_ = parse_pass(text)
    assert isinstance(pass_, Rounding)
    return pass_


@pytest.mark.parametrize(("text", "method", "options"), METHODS)
def test_the_first_layer_is_rounded_as_one_matrix(
    tiny: Callable[[str], Program], text: str, method: Method, options: dict[str, Any]
) -> None:
    """Nothing before it is rounded, so that x̂ = x."""
    program = tiny("qwen3")
    first = find_contractions(program)[0]
    key, seen = program.key(first.weight), []
    program_input = first.input

    def observe(node: Any, value: Any) -> None:
        if node is program_input:
            seen.append(value.flatten(0, -2).double())

    for batch in DATA.split(8):
        run(program, fill(program, {"input_ids": batch}), observe)
    x = torch.cat(seen)
    weight = program.weight(first.weight)
    spec = QuantSpec.parse(SPEC)
    found = round_matrix(weight, Stored.plain(spec, weight), Statistics(x.T @ x, x.T @ x), method, **options)
    marked(program)
    [report] = run_segments(program, [made(text)], DATA.split(8))
    codes = program.weights[f"{key}.codes"]
    assert (codes != found.result.codes).float().mean() < 2e-3  # sums of another order decide a tie now and then
    figures = report.measured[key]
    assert figures["loss"] == pytest.approx(found.figures.loss, rel=0.02)
    assert figures["loss"] < figures["rtn_loss"]


@pytest.mark.parametrize(
    "text", ["gptq", "gptq(target=float)", "gptaq", "qronos", "gpfq", "awq-clip", "gptq(clip=true)"]
)
@pytest.mark.parametrize("model", ["gpt2", "qwen3_moe"])
def test_no_layer_is_worse_than_nearest(tiny: Callable[[str], Program], text: str, model: str) -> None:
    """Fused projections stored [in, out], and experts."""
    program = marked(tiny(model))
    [report] = run_segments(program, [made(text)], DATA.split(8))
    assert len(report.measured) > 8
    better = 0
    for figures in (f for f in report.measured.values() if "loss" in f):
        error, nearest = ("gap", "rtn_gap") if "gap" in figures else ("loss", "rtn_loss")
        assert figures[error] <= figures[nearest]
        better += figures[error] < figures[nearest]
    assert better >= 6


@pytest.mark.parametrize(
    "spec",
    [
        "nf4 group=16",
        "nf4 group=16 double=8x4",
        "int4 asym group=16 double=6x4",
        "int3 asym group=16 zero=float",
        "mxfp4",
        "mxfp4(mse)",
        "nvfp4",
        "nvfp4(mse)",
        "e2m1 group=16",
        "e3m2 channel",
        "mx6",
        "int4 sym group=16 via=e4m3fn",
    ],
)
def test_gptq_in_any_format(tiny: Callable[[str], Program], spec: str) -> None:
    """Codes that are stored decode to what was rounded to, and cost less than those of rounding to nearest."""
    program = tiny("qwen3")
    weights = {program.key(c.weight): program.weight(c.weight).clone() for c in find_contractions(program)[:-1]}
    plain = program.clone()
    marked(program, spec)
    [report] = run_segments(program, [made("gptq")], DATA.split(8))
    inputs: dict[str, torch.Tensor] = {}
    first = find_contractions(plain)[0]

    def observe(node: Any, value: Any) -> None:
        if node is first.input:
            inputs["x"] = value.flatten(0, -2)

    run(plain, fill(plain, {"input_ids": DATA}), observe)
    for key in weights:
        figures = report.measured[key]
        assert figures["loss"] < figures["rtn_loss"], key
        assert figures["rtn_kept"] == 0
        assert f"{key}.codes" in program.weights
        assert figures["sqnr_db"] < 40
    key = plain.key(first.weight)
    decoded = next(c for c in find_contractions(program) if c.node.name == first.node.name)
    values: list[torch.Tensor] = []
    run(
        program,
        fill(program, {"input_ids": DATA[:1]}),
        lambda n, v: values.append(v) if n is decoded.path[-1] else None,
    )
    wrong = inputs["x"] @ (values[0] - weights[key]).T
    loss = float(wrong.square().sum() / (inputs["x"] @ weights[key].T).square().sum())
    assert report.measured[key]["loss"] == pytest.approx(loss, rel=1e-2)  # so these are the codes that were counted
    nearest = quantize_tensor(weights[key], QuantSpec.parse(spec)).dequantize(torch.float32)
    wrong = inputs["x"] @ (nearest - weights[key]).T
    assert loss < float(wrong.square().sum() / (inputs["x"] @ weights[key].T).square().sum())


def test_one_input_is_factored_once(tiny: Callable[[str], Program], monkeypatch: pytest.MonkeyPatch) -> None:
    count = 0
    module = importlib.import_module("qcompile.rounding.factor")
    original = module.factor

    def counted(*args: Any) -> Any:
        nonlocal count
        count += 1
        return original(*args)

    program = marked(tiny("qwen3"))
    monkeypatch.setattr(module, "factor", counted)
    run_segments(program, [made("gptq(target=float)")], DATA.split(8))
    assert count == 2 * 4  # q, k, v; o; gate, up; down of each of two layers


def test_queries_and_keys_are_found_through_norms_and_rotary_positions(tiny: Callable[[str], Program]) -> None:
    program = tiny("qwen3")
    modules = {program.module_of(node) for node in made_for_scores(program)}
    assert modules == {f"model.layers.{i}.self_attn.{n}_proj" for i in (0, 1) for n in "qk"}
    program = tiny("gpt2")
    modules = {program.module_of(node) for node in made_for_scores(program)}
    assert modules == {f"transformer.h.{i}.attn.c_attn" for i in (0, 1)}


def test_clipping_leaves_queries_and_keys_to_nearest(tiny: Callable[[str], Program]) -> None:
    program = marked(tiny("qwen3"))
    [report] = run_segments(program, [made("awq-clip")], DATA.split(8))
    for key, figures in report.measured.items():
        if "loss" in figures:
            assert (figures["loss"] == figures["rtn_loss"]) == ("q_proj" in key or "k_proj" in key), key
    assert any("4 weights make queries or keys" in note for note in report.notes)


REFUSED = [
    ("gptq(static_groups=false)", "gptq: act_order=true needs static_groups=true; or take act_order=group"),
    ("qronos(static_groups=false, act_order=group, clip=true)", "qronos: clip needs scales that are known ahead"),
    ("gpfq(static_groups=false, act_order=false, accumulator_bits=16)", "gpfq: accumulator_bits needs scales"),
    ("gptaq(magr=0)", "gptaq: magr=0 is not above 0"),
    ("gptq(accumulator_bits=1)", "use 2 to 48 bits"),
    ("gptq(accumulator_bits=16, accumulator_tile=0)", "tiles of at least one input"),
    ("awq-clip(tried=21)", "awq-clip: tried=21 of steps=20"),
    ("qronos(damping=0.1)", "no option 'damping'"),
]


@pytest.mark.parametrize(("text", "message"), REFUSED)
def test_options_that_do_not_fit_are_refused(text: str, message: str) -> None:
    with pytest.raises(RecipeError, match=r"^[^\n]*$") as error:
        parse_pass(text)
    assert message in str(error.value)


@pytest.mark.parametrize("text", [text for text, *_ in METHODS])
def test_passes_print_and_parse_back(text: str) -> None:
    pass_: Pass = parse_pass(text)
    assert parse_pass(str(pass_)) == pass_


def test_without_a_float_stream_methods_say_what_they_are(tiny: Callable[[str], Program]) -> None:
    from qcompile.calibration.settings import Settings

    program = marked(tiny("qwen3"))
    setup = Setup(program, without_rounding(program), Settings(propagate="float"))
    told = {text: made(text).begin(setup).finish().notes for text in ("qronos", "gpfq")}
    assert any("is plain GPTQ" in note for note in told["qronos"])
    assert not any("is plain GPTQ" in note for note in told["gpfq"])
