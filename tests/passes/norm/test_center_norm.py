"""center-norm: which weights lose their mean, which norms become RMS norms, and that the function stays."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.norm.center_norm import CenterNorm

Center = Callable[..., tuple[Program, Report, dict[str, Tensor]]]


@pytest.fixture
def center(text: Callable[..., str], applied: Callable[..., tuple[Program, Report, dict[str, Tensor]]]) -> Center:
    """Centre the norms of a program; the program, the report and the weights as they were."""
    return lambda *parts: applied(CenterNorm(), text(*parts))


def kinds(program: Program) -> list[str]:
    """The norms of a program, in order."""
    return [name for n in program.nodes if "norm" in (name := str(n.target).split(".")[1])]


def reasons(report: Report) -> list[tuple[str, str]]:
    return [(e.where, e.what) for e in report.skipped]


IDS = "ids: i64[batch, sequence]"
EMBED = "x = aten.embedding.default(table, ids)"
BLOCK = """n = aten.layer_norm.default(x, [8], g, h, 0.01)
           a = aten.linear.default(n, up, c)
           r = aten.relu.default(a)
           d = aten.linear.default(r, down, e)
           z = aten.add.Tensor(x, d)
           m = aten.layer_norm.default(z, [8], k, None, 0.01)
           y = aten.linear.default(m, head)"""
WEIGHTS = (
    "table: f64[9, 8], g: f64[8], h: f64[8], up: f64[6, 8], c: f64[6], down: f64[8, 6], e: f64[8], k: f64[8], "
    "head: f64[5, 8]"
)


def test_a_stream(center: Center) -> None:
    program, report, before = center(IDS, WEIGHTS, f"{EMBED}\n{BLOCK}")
    assert kinds(program) == ["rms_norm", "rms_norm"]
    for key, axis in (("table", 1), ("down", 0), ("e", 0)):
        expected = before[key] - before[key].mean(axis, keepdim=True)
        assert torch.allclose(program.weights[key], expected, atol=1e-14)
    for key in ("up", "c", "head", "g", "h", "k"):
        assert torch.equal(program.weights[key], before[key])
    assert [(e.where, e.what) for e in report.rewritten] == [
        (norm, "an RMS norm now; its mean is folded into 3 weights") for norm in ("n", "m")
    ]
    assert report.skipped == []


def test_a_bias_is_added_behind(center: Center) -> None:
    program, _, _ = center(IDS, WEIGHTS, f"{EMBED}\n{BLOCK}")
    first, second = (n for n in program.nodes if "rms_norm" in str(n.target))
    (behind,) = first.users
    assert behind.target == torch.ops.aten.add.Tensor
    assert behind.args[0] is first
    assert program.is_weight(behind.args[1])
    assert [str(u.target) for u in second.users] == ["aten.linear.default"]
    assert [program.arg(n, "eps") for n in (first, second)] == [0.01, 0.01]


def test_a_table_of_positions(center: Center) -> None:
    """Added to tokens, whole or in part: its rows lose their means."""
    program, report, before = center(
        "ids: i64[batch, 5]",
        f"{WEIGHTS}, wpe: f64[6, 8]",
        f"""t = aten.embedding.default(table, ids)
        p = aten.slice.Tensor(wpe, 0, 0, 5)
        x = aten.add.Tensor(t, p)
        {BLOCK}""",
    )
    assert kinds(program) == ["rms_norm", "rms_norm"]
    rows = before["wpe"] - before["wpe"].mean(1, keepdim=True)
    assert torch.allclose(program.weights["wpe"][:5], rows[:5], atol=1e-14)
    assert report.skipped == []


def test_a_looked_up_table_of_positions(center: Center) -> None:
    program, _, _ = center(
        f"{IDS}, at: i64[sequence]",
        f"{WEIGHTS}, wpe: f64[6, 8]",
        f"""t = aten.embedding.default(table, ids)
        p = aten.embedding.default(wpe, at)
        x = aten.add.Tensor(t, p)
        {BLOCK}""",
    )
    assert kinds(program) == ["rms_norm", "rms_norm"]
    assert program.weights["wpe"].mean(1).abs().max() < 1e-14


def test_norms_over_heads(center: Center) -> None:
    """Rows of a projection lose the mean of their head."""
    program, report, before = center(
        "i: f64[batch, sequence, 6]",
        "q: f64[8, 6], c: f64[8], g: f64[4], o: f64[5, 4]",
        """a = aten.linear.default(i, q, c)
        h = aten.unflatten.int(a, -1, [2, 4])
        n = aten.layer_norm.default(h, [4], g, None, 0.01)
        y = aten.linear.default(n, o)""",
    )
    assert kinds(program) == ["rms_norm"]
    heads = before["q"].view(2, 4, 6)
    assert torch.allclose(program.weights["q"], (heads - heads.mean(1, keepdim=True)).view(8, 6), atol=1e-14)
    heads = before["c"].view(2, 4)
    assert torch.allclose(program.weights["c"], (heads - heads.mean(1, keepdim=True)).view(8), atol=1e-14)
    assert report.skipped == []


def test_a_tied_table_is_parted(center: Center) -> None:
    body = BLOCK.replace("aten.linear.default(m, head)", "aten.linear.default(m, table)")
    program, report, before = center(IDS, WEIGHTS.replace(", head: f64[5, 8]", ""), f"{EMBED}\n{body}")
    assert kinds(program) == ["rms_norm", "rms_norm"]
    assert len(report.notes) == 1
    assert report.notes[0].startswith("'table' is untied for y: ")
    assert torch.equal(program.weights["table.untied"], before["table"])
    assert program.weights["table"].mean(1).abs().max() < 1e-14


@pytest.mark.parametrize(
    ("extra", "reason"),
    [
        ("p = aten.linear.default(x, other)", "p reads the stream with its mean (sink)"),
        ("p = aten.rms_norm.default(x, [8], None, 0.01)", "p reads the stream too and takes no mean off it"),
        ("p = aten.mul.Tensor(x, 2.0)", "output: is returned as 'p'"),
        ("p = aten.relu.default(z)", "p: relu bends each element"),
        ("p = aten.sum.dim_IntList(z, [-1])", "p: sums over channels"),
    ],
    ids=["a product", "an RMS norm", "the output", "relu", "a sum"],
)
def test_what_reads_the_stream_with_its_mean(center: Center, extra: str, reason: str) -> None:
    weights = f"{WEIGHTS}, other: f64[3, 8]" if "other" in extra else WEIGHTS
    program, report, _ = center(IDS, weights, f"{EMBED}\n{BLOCK}\n{extra}", "y p")
    assert kinds(program)[:2] == ["layer_norm", "layer_norm"]
    assert report.rewritten == []
    assert [where for where, _ in reasons(report)] == ["n", "m"]
    assert all(reason in what for _, what in reasons(report))


def test_norms_over_all_channels_and_over_each_head_of_them(center: Center) -> None:
    """Less its mean over each head, a vector is more than less its mean: neither norm can have its way."""
    body = f"""{EMBED}
        n = aten.layer_norm.default(x, [8], g, None, 0.01)
        w = aten.unflatten.int(x, -1, [2, 4])
        k = aten.layer_norm.default(w, [4], None, None, 0.01)
        r = aten.flatten.using_ints(k, 2, 3)
        s = aten.add.Tensor(n, r)
        y = aten.linear.default(s, head)"""
    program, report, _ = center(IDS, "table: f64[9, 8], g: f64[8], head: f64[5, 8]", body)
    assert kinds(program) == ["layer_norm", "layer_norm"]
    assert report.rewritten == []
    assert ("k", "n reads the stream too and takes a mean over more channels") in reasons(report)


@pytest.mark.parametrize(
    ("move", "reason"),
    [
        ("aten.roll.default(x, [1], [-1])", "what it reads is no space with weights for sources"),
        ("aten.flip.default(x, [-1])", "what it reads is no space with weights for sources"),
    ],
)
def test_channels_in_another_order_move_alike(center: Center, move: str, reason: str) -> None:
    program, report, _ = center(
        IDS,
        "table: f64[9, 8], g: f64[8], head: f64[5, 8]",
        f"""{EMBED}
        t = {move}
        z = aten.add.Tensor(x, t)
        n = aten.layer_norm.default(z, [8], g, None, 0.01)
        y = aten.linear.default(n, head)""",
    )
    assert kinds(program) == ["layer_norm"]
    assert reasons(report) == [("n", reason)]


def test_an_input_has_no_weight_to_lose_its_mean(center: Center) -> None:
    program, report, _ = center("x: f64[batch, 8]", "g: f64[8]", "y = aten.layer_norm.default(x, [8], g, None, 0.01)")
    assert kinds(program) == ["layer_norm"]
    assert reasons(report) == [("y", "what it reads is no space with weights for sources")]


def test_a_post_norm_stays(center: Center) -> None:
    """What a norm gives is added to the stream: its gain and bias are sources that have no matrix."""
    program, report, _ = center(
        IDS,
        "table: f64[9, 8], g: f64[8], h: f64[8], w: f64[8, 8], k: f64[8], head: f64[5, 8]",
        f"""{EMBED}
        n = aten.layer_norm.default(x, [8], g, h, 0.01)
        d = aten.linear.default(n, w)
        z = aten.add.Tensor(n, d)
        m = aten.layer_norm.default(z, [8], k, None, 0.01)
        y = aten.linear.default(m, head)""",
    )
    assert kinds(program) == ["rms_norm", "layer_norm"]
    assert [e.where for e in report.rewritten] == ["n"]
    assert [where for where, _ in reasons(report)] == ["m"]


def test_bfloat16_is_rounded_once(text: Callable[..., str]) -> None:
    program = Program.parse(text(IDS, WEIGHTS, f"{EMBED}\n{BLOCK}").replace("f64", "bf16"))
    before = {key: tensor.double() for key, tensor in program.weights.items()}
    PassManager([CenterNorm()]).run(program)
    for key, axis in (("table", 1), ("down", 0), ("e", 0)):
        expected = (before[key] - before[key].mean(axis, keepdim=True)).bfloat16()
        assert (program.weights[key].double() - expected.double()).abs().max() <= 2**-8 * before[key].abs().max()
