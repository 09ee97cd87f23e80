"""AwqScale: the paper's search, bounded memory, what it leaves alone, what it is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest
import torch
from oracles import diagonal_scales
from torch import Tensor

from qcompile import run_passes
from qcompile.drift import drift
from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.pass_base import Report, parse_pass
from qcompile.passes.scale.watch import Sample

BLOCK = """\
    def main(
        input_ids: i64[batch, sequence], *, table: f64[90, 8], gain: f64[8], q: f64[4, 8], k: f64[8, 6], up: f64[8, 6],
        down: f64[3, 8]
    ):
        e = aten.embedding.default(table, input_ids)
        n = aten.rms_norm.default(e, [8], gain, 0.1)
        yq = aten.linear.default(n, q)
        h = aten.matmul.default(n, k)
        u = aten.linear.default(h, up)
        a = aten.relu.default(u)
        y = aten.linear.default(a, down)
        return {"yq": yq, "y": y}"""
SPEC = "spec=int4 asym group=4"


def parse(text: str) -> Program:
    """A program with a few channels that stand out in what the first products read."""
    program = Program.parse(textwrap.dedent(text), None, seed=6)
    gain = program.weight_node("gain")
    assert gain is not None
    program.set_weight(gain, torch.tensor([20.0, 1, 0.5, 8, 0.3, 1, 2, 0.7]).double())
    return program


def scaled(program: Program, tokens: list[Tensor], passes: str) -> Report:
    before = program.run({"input_ids": tokens[0]})
    (report,) = run_passes(program, passes, tokens)
    assert drift(program.run({"input_ids": tokens[0]}), before) <= 1e-12
    return report


def test_the_search_is_the_papers(tokens: list[Tensor]) -> None:
    """One space, all tokens: the scales, and the error of every exponent, are those of plain loops."""
    program, old = parse(BLOCK), parse(BLOCK)
    report = scaled(program, tokens, f"awq-scale({SPEC}, grid=6)")
    ids = torch.cat([t.flatten() for t in tokens])
    e = old.weights["table"][ids]
    n = e / (e.square().mean(1, keepdim=True) + 0.1).sqrt() * old.weights["gain"]
    readers = [old.weights["q"].tolist(), old.weights["k"].T.tolist()]
    s, errors = diagonal_scales.awq(n.tolist(), readers, 6, 4, 4)
    expected = torch.tensor(s, dtype=torch.float64)
    torch.testing.assert_close(old.weights["gain"] / program.weights["gain"], expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(program.weights["q"], old.weights["q"] * expected)
    figures = report.measured["gain … k"]
    assert figures["error"] == pytest.approx(errors[0], rel=1e-6)
    assert figures["error_after"] == pytest.approx(min(errors), rel=1e-6)
    assert figures["exponent"] == pytest.approx(errors.index(min(errors)) / 5)
    assert min(errors) < 0.7 * errors[0]


def test_the_error_really_falls(tokens: list[Tensor]) -> None:
    """What rounded weights compute, against what it was."""

    def error(passes: str) -> float:
        program = parse(BLOCK)
        exact = program.run({"input_ids": tokens[0]})["yq"]
        run_passes(
            program, f"{passes}, insert-qdq(weights=int4 asym group=4, rules=[{{match: up, weights: null}}])", tokens
        )
        return float((program.run({"input_ids": tokens[0]})["yq"] - exact).norm())

    assert error(f"awq-scale({SPEC})") < 0.85 * error("dead-code")


def test_w4_of_an_embedded_model_is_better_than_plain_rounding(
    embedded: Callable[[str], Program], tokens: list[Tensor]
) -> None:
    inject = "inject-outliers(gain=20.0)"

    def error(passes: str) -> float:
        program = embedded("llama")
        feeds = fill(program, {"input_ids": tokens[0]})
        exact = program.run(feeds)["logits"]
        run_passes(program, f"{passes}, insert-qdq(weights=int3 asym group=32)", tokens)
        return float((program.run(feeds)["logits"] - exact).norm())

    assert error(f"{inject}, awq-scale(spec=int3 asym group=32, grid=8, rows=32)") < 0.8 * error(inject)


def test_heads_and_routers_have_no_say(embedded: Callable[[str], Program], tokens: list[Tensor]) -> None:
    program, old = embedded("moe"), embedded("moe")
    (report,) = run_passes(program, "awq-scale(spec=int4 asym group=32, grid=3, rows=8)", tokens)
    assert [e.what for e in report.skipped] == ["it is a head, which is not among roles"]
    assert torch.equal(program.weights["model.norm.weight"], old.weights["model.norm.weight"])
    router = "model.layers.0.mlp.gate.weight"
    assert not torch.equal(program.weights[router], old.weights[router])  # it reads what experts read, and follows


@pytest.mark.parametrize(
    ("text", "options", "where", "reason"),
    [
        (BLOCK, "spec=int4 asym group=8", "u", "does not divide"),
        (
            BLOCK.replace("relu.default(u)", "gelu.default(u)"),
            SPEC + ", roles=[linear]",
            "y",
            "gelu bends each element",
        ),
    ],
)
def test_reasons(text: str, options: str, where: str, reason: str, tokens: list[Tensor]) -> None:
    report = scaled(parse(text), tokens, f"awq-scale({options}, grid=3)")
    reasons = {entry.where: entry.what for entry in report.skipped}
    assert reason in reasons[where]


def test_a_convolution_is_left_alone(tokens: list[Tensor]) -> None:
    text = BLOCK.replace("down: f64[3, 8]", "down: f64[3, 8, 2]").replace(
        "y = aten.linear.default(a, down)", "t = aten.transpose.int(a, 1, 2)\n        y = aten.conv1d.default(t, down)"
    )
    report = scaled(parse(text), tokens, f"awq-scale({SPEC}, grid=3, roles=[linear, convolution])")
    assert ("y", "conv1d slides a window, which this pass does not simulate") in [
        (e.where, e.what) for e in report.skipped
    ]


def test_a_dead_channel_keeps_its_factor(tokens: list[Tensor]) -> None:
    program = parse(BLOCK)
    gain = program.weight_node("gain")
    assert gain is not None
    program.set_weight(gain, program.weight(gain) * torch.tensor([1, 0, 1, 1, 1, 1, 1, 1]))
    before = program.weights["q"]
    scaled(program, tokens, f"awq-scale({SPEC}, grid=3)")
    torch.testing.assert_close(program.weights["q"][:, 1], before[:, 1])
    assert not torch.equal(program.weights["q"], before)


def test_the_sample_is_bounded_seeded_and_even() -> None:
    def sample(seed: int, batch: int) -> Sample:
        found = Sample(200, seed)
        for rows in torch.arange(1000.0).reshape(-1, batch, 1):
            found.see(rows)
            assert len(found.rows) <= 200
        return found

    first = sample(0, 10)
    assert torch.equal(first.rows, sample(0, 10).rows)
    assert not torch.equal(first.rows, sample(1, 10).rows)
    assert first.rows.unique().numel() == 200
    assert first.mean.item() == pytest.approx(499.5)
    assert 440 < first.rows.mean() < 560  # neither the first nor the last
    few = Sample(200, 0)
    few.see(torch.ones(3, 2))
    assert few.rows.shape == (3, 2)


@pytest.mark.parametrize("options", ["grid=1", "rows=0", "spec=int4 sym token dynamic", "spec=int99"])
def test_bad_options(options: str, tokens: list[Tensor]) -> None:
    with pytest.raises(RecipeError) as caught:
        run_passes(parse(BLOCK), f"awq-scale({options})", tokens)
    assert "\n" not in str(caught.value)


def test_options_print_and_parse_back() -> None:
    pass_ = parse_pass("awq-scale(spec=int3 sym group=64, grid=5, rows=16, seed=2, roles=[linear, head])")
    assert parse_pass(str(pass_)) == pass_
