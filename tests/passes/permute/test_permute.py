"""permute: which weights move and how, what is left alone, and what it is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile import QuantSpec, run_passes
from qcompile.drift import drift
from qcompile.errors import QCompileError, RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, parse_pass
from qcompile.pass_manager import PassManager
from qcompile.passes.permute.arrange import Arrange
from qcompile.passes.permute.permute import Permute
from qcompile.passes.permute.permute_by_hessian import PermuteByHessian

MLP = textwrap.dedent("""\
    def main(x: f64[batch, 6], *, up: f64[8, 6], b: f64[8], down: f64[5, 8], out: f64[3, 8]):
        h: f64[batch, 8] = aten.linear.default(x, up, b)
        a: f64[batch, 8] = aten.silu.default(h)
        y: f64[batch, 5] = aten.linear.default(a, down)
        z: f64[batch, 3] = aten.linear.default(a, out)
        return {"y": y, "z": z}""")

ATTENTION = textwrap.dedent("""\
    def main(q: f64[2, 4, sequence, 6], k: f64[2, 4, sequence, 6], x: f64[2, sequence, 8], *, v: f64[8, 8], o: f64[7, 16]):
        a: f64[2, sequence, 8] = aten.linear.default(x, v)
        b: f64[2, sequence, 2, 4] = aten.unflatten.int(a, -1, [2, 4])
        c: f64[2, 2, sequence, 4] = aten.transpose.int(b, 1, 2)
        d: f64[2, 4, sequence, 4] = aten.scaled_dot_product_attention.default(q, k, c, enable_gqa=True)
        e: f64[2, sequence, 4, 4] = aten.transpose.int(d, 1, 2)
        f: f64[2, sequence, 16] = aten.flatten.using_ints(e, 2, 3)
        y: f64[2, sequence, 7] = aten.linear.default(f, o)
        return {"y": y}""")


def after(
    text: str, pass_: Pass, feeds: Callable[..., Any], batches: list[Tensor] | None = None
) -> tuple[Program, Any]:
    """The program behind the pass, which must keep the function and its text, and the report."""
    program = Program.parse(text)
    inputs = feeds(program)
    expected = program.run(inputs)
    (report,) = PassManager([pass_], batches=batches).run(program)
    assert drift(program.run(inputs), expected) <= 1e-12
    assert str(program) == text
    return program, report


@pytest.mark.parametrize("descending", [True, False])
@pytest.mark.parametrize("score", ["range", "norm"])
def test_hidden_channels_are_sorted_by_all_their_sinks(score: Any, descending: bool, feeds: Callable[..., Any]) -> None:
    before = Program.parse(MLP).weights
    program, report = after(MLP, Permute(score=score, descending=descending), feeds)
    columns = torch.cat([before["down"], before["out"]])
    scores = columns.abs().amax(0) if score == "range" else columns.norm(dim=0)
    order = scores.argsort(descending=descending)
    assert torch.equal(program.weights["up"], before["up"][order])
    assert torch.equal(program.weights["b"], before["b"][order])
    assert torch.equal(program.weights["down"], before["down"][:, order])
    assert torch.equal(program.weights["out"], before["out"][:, order])
    assert [e.where for e in report.rewritten] == ["up … out"]
    assert report.rewritten[0].what.startswith("hidden: ")


def test_heads_of_a_group_move_alike(feeds: Callable[..., Any]) -> None:
    before = Program.parse(ATTENTION).weights
    program, report = after(ATTENTION, Permute(), feeds)
    assert len(report.rewritten) == 2  # one a head of v
    for head in range(2):
        columns = before["o"][:, 8 * head : 8 * head + 8].reshape(7, 2, 4)
        order = columns.abs().amax((0, 1)).argsort(descending=True)
        assert torch.equal(program.weights["v"][4 * head : 4 * head + 4], before["v"][4 * head : 4 * head + 4][order])
        assert torch.equal(program.weights["o"][:, 8 * head : 8 * head + 8], columns[:, :, order].flatten(1))
    assert str(after(ATTENTION, Permute(heads=False), feeds)[1].rewritten) == "[]"


def test_even_deals_the_largest_channels_out() -> None:
    scores = torch.tensor([1.0, 8.0, 3.0, 6.0, 5.0, 4.0, 7.0, 2.0])
    groups = scores[Arrange((), "even", 2, True).order(scores)].view(4, 2)
    assert groups.tolist() == [[8, 1], [7, 2], [6, 3], [5, 4]]
    groups = scores[Arrange((), "even", 4, True).order(scores)].view(2, 4)
    assert groups.tolist() == [[8, 5, 4, 1], [7, 6, 3, 2]]


def test_even_evens_out_the_groups(feeds: Callable[..., Any]) -> None:
    columns = Program.parse(MLP).weights["down"], Program.parse(MLP).weights["out"]
    spread = torch.cat(columns).norm(dim=0).view(2, 4).sum(1)
    program, _ = after(MLP, Permute(score="norm", arrange="even", group=4), feeds)
    now = torch.cat([program.weights["down"], program.weights["out"]]).norm(dim=0).view(2, 4).sum(1)
    assert (now[0] - now[1]).abs() < 0.5 * (spread[0] - spread[1]).abs()


@pytest.mark.parametrize(
    ("text", "pass_", "reasons"),
    [
        (MLP, Permute(arrange="even", group=3), ["groups of 3 do not divide its 8 channels"]),
        (MLP, Permute(hidden=False), []),
        (MLP.replace('"z": z', '"z": z, "a": a'), Permute(), ["output: is returned as 'a'"]),
        (
            MLP.replace("a: f64[batch, 8] = aten.silu.default(h)", "a: f64[batch, 8] = aten.cumsum.default(h, -1)"),
            Permute(),
            ["a: runs along the channels"],
        ),
    ],
    ids=["groups that do not divide", "not asked for", "returned", "a running sum"],
)
def test_near_miss(text: str, pass_: Pass, reasons: list[str], left_alone: Callable[..., Any]) -> None:
    found = set(left_alone(pass_, text))
    assert found - {"reads no channels that a weight makes"} == set(reasons)


def test_space_without_a_product_behind_it(left_alone: Callable[..., Any]) -> None:
    text = """\
    def main(x: f64[2, 5, 6], *, wq: f64[4, 6], wk: f64[4, 6]):
        q: f64[2, 5, 4] = aten.linear.default(x, wq)
        k: f64[2, 5, 4] = aten.linear.default(x, wk)
        t: f64[2, 4, 5] = aten.transpose.int(k, 1, 2)
        s: f64[2, 5, 5] = aten.matmul.default(q, t)
        return {"s": s}"""
    assert "no product reads it, so its order is nothing to a weight's groups" in left_alone(Permute(), text)


@pytest.mark.parametrize("text", ["permute(arrange=even)", "permute(group=4)", "permute(arrange=even, group=0)"])
def test_options_that_do_not_agree(text: str) -> None:
    with pytest.raises(RecipeError, match="group"):
        run_passes(Program.parse(MLP), text)


def test_prints_and_parses_back() -> None:
    for pass_ in (Permute(score="norm", arrange="even", group=4, heads=False), PermuteByHessian(descending=False)):
        assert parse_pass(str(pass_)) == pass_


def test_nan_is_an_error() -> None:
    program = Program.parse(MLP)
    program.weights["down"] = program.weights["down"] * float("nan")
    with pytest.raises(QCompileError, match="not finite"):
        run_passes(program, "permute")


def test_groups_of_alike_channels_round_better() -> None:
    """A few columns are a hundred times the others: in order, they share groups with each other alone."""
    program = Program.parse(
        textwrap.dedent("""\
        def main(x: f32[batch, 32], *, up: f32[256, 32], down: f32[64, 256]):
            h: f32[batch, 256] = aten.linear.default(x, up)
            a: f32[batch, 256] = aten.relu.default(h)
            y: f32[batch, 64] = aten.linear.default(a, down)
            return {"y": y}""")
    )
    loud = torch.randperm(256, generator=torch.Generator().manual_seed(0))[:16]
    down = program.weights["down"].clone()
    down[:, loud] *= 100
    program.weights["down"] = down

    def error(program: Program) -> Tensor:
        weight = program.weights["down"]
        rounded = QuantSpec.parse("int4 sym group=16").quantize(weight).dequantize()
        return (weight - rounded).square().amax(0).clamp(max=1).sum()

    before = error(program)
    run_passes(program, "permute")
    assert error(program) < 0.2 * before


def test_hessian_order_on_data(feeds: Callable[..., Any]) -> None:
    text = textwrap.dedent("""\
    def main(input_ids: i64[batch, sequence], *, table: f64[9, 6], up: f64[8, 6], down: f64[5, 8]):
        x: f64[batch, sequence, 6] = aten.embedding.default(table, input_ids)
        h: f64[batch, sequence, 8] = aten.linear.default(x, up)
        a: f64[batch, sequence, 8] = aten.gelu.default(h)
        y: f64[batch, sequence, 5] = aten.linear.default(a, down)
        return {"y": y}""")
    before = Program.parse(text).weights
    batches = [torch.tensor([[0, 1, 8, 3]]), torch.tensor([[7, 5, 1, 1]])]
    program, report = after(text, PermuteByHessian(), feeds, batches)
    tokens = torch.cat(batches).flatten()
    x = before["table"][tokens]
    first = x.square().sum(0).argsort(descending=True)
    assert torch.equal(program.weights["table"], before["table"][:, first])
    a = torch.nn.functional.gelu(x @ before["up"].T)
    second = a.square().sum(0).argsort(descending=True)
    assert torch.equal(program.weights["down"], before["down"][:, second])
    assert torch.equal(program.weights["up"], before["up"][second][:, first])
    assert len(report.rewritten) == 2


def test_each_sink_counts_relative_to_its_own_mean(feeds: Callable[..., Any]) -> None:
    """One stream, read plainly and behind a norm: the plain one's larger numbers do not decide alone."""
    text = textwrap.dedent("""\
    def main(input_ids: i64[batch, sequence], *, table: f64[9, 6], g: f64[6], a: f64[5, 6], b: f64[5, 6]):
        x: f64[batch, sequence, 6] = aten.embedding.default(table, input_ids)
        n: f64[batch, sequence, 6] = aten.rms_norm.default(x, [6], g, 0.01)
        y: f64[batch, sequence, 5] = aten.linear.default(n, a)
        z: f64[batch, sequence, 5] = aten.linear.default(x, b)
        return {"y": y, "z": z}""")
    before = Program.parse(text).weights
    batches = [torch.tensor([[0, 1, 8, 3]])]
    program, _ = after(text, PermuteByHessian(), feeds, batches)
    x = before["table"][batches[0][0]]
    n = x / (x.square().mean(-1, keepdim=True) + 0.01).sqrt() * before["g"]
    plain, normed = x.square().sum(0), n.square().sum(0)
    order = torch.maximum(plain / plain.mean(), normed / normed.mean()).argsort(descending=True)
    assert torch.equal(program.weights["b"], before["b"][:, order])
    assert torch.equal(program.weights["g"], before["g"][order])


def test_hessian_needs_tokens() -> None:
    program = Program.parse(MLP)
    with pytest.raises(QCompileError, match="no tokens"):
        PassManager([PermuteByHessian()], batches=[]).run(program)
    with pytest.raises(QCompileError, match="needs calibration data"):
        PassManager([PermuteByHessian()]).run(program)
