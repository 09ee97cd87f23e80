"""fold-norm-affine: what gains and biases are folded into, what keeps them, and that the function stays."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.norm.fold_norm_affine import FoldNormAffine

Fold = Callable[..., tuple[Program, Report]]


def program_of(inputs: str, weights: str, body: str, outputs: str = "y") -> str:
    """IR text with the types of calls left out; an input x is made by a weight from what is fed."""
    if inputs.startswith("x"):
        inputs, weights, body = (
            f"i{inputs[1:]}",
            f"stem: f64[8, 8], {weights}",
            f"x = aten.linear.default(i, stem)\n{body}",
        )
    lines = [f"    {line.strip()}" for line in body.strip().splitlines()]
    returned = ", ".join(f'"{name}": {name}' for name in outputs.split())
    return "\n".join([f"def main({inputs}, *, {weights}):", *lines, f"    return {{{returned}}}"])


@pytest.fixture
def fold(feeds: Callable[..., dict[str, Tensor]]) -> Fold:
    """Fold the norms of a program in float64; the function must stay."""

    def check(text: str, weights: dict[str, Tensor] | None = None) -> tuple[Program, Report]:
        program = Program.parse(text, weights)
        given = [feeds(program, seed) for seed in (0, 1)]
        expected = [program.run(x) for x in given]
        (report,) = PassManager([FoldNormAffine()]).run(program)
        for x, before in zip(given, expected, strict=True):
            assert drift(program.run(x), before) <= 1e-12
        return program, report

    return check


def affine(program: Program) -> list[list[str]]:
    """The gain and bias that each norm still has, by key."""
    found = []
    for node in program.nodes:
        if "norm" in str(node.target):
            vectors = [n for n in node.all_input_nodes if program.is_weight(n)]
            found.append([program.key(v) for v in vectors])
    return found


LAYER = "n = aten.layer_norm.default(x, [8], g, h, 0.01)"
RMS = "n = aten.rms_norm.default(x, [8], g, 0.01)"
X = "x: f64[batch, sequence, 8]"
GH = "g: f64[8], h: f64[8]"


def test_a_gain_goes_into_all_that_reads_it(fold: Fold) -> None:
    text = program_of(
        X,
        "g: f64[8], up: f64[6, 8], gate: f64[5, 8], c: f64[5]",
        f"""{RMS}
        y = aten.linear.default(n, up)
        z = aten.linear.default(n, gate, c)""",
        "y z",
    )
    before = Program.parse(text).weights
    program, report = fold(text)
    assert affine(program) == [[]]
    assert "g" not in program.weights
    assert torch.equal(program.weights["up"], before["up"] * before["g"])
    assert torch.equal(program.weights["gate"], before["gate"] * before["g"])
    assert torch.equal(program.weights["c"], before["c"])
    assert [(e.where, e.what) for e in report.rewritten] == [("n", "folded into what reads it")]
    assert report.skipped == []
    assert (before["g"] < 0).any()  # gains are of both signs here


def test_a_bias_goes_into_biases_and_makes_those_that_are_missing(fold: Fold) -> None:
    text = program_of(
        X,
        f"{GH}, up: f64[6, 8], gate: f64[5, 8], c: f64[5]",
        f"""{LAYER}
        y = aten.linear.default(n, up)
        z = aten.linear.default(n, gate, c)""",
        "y z",
    )
    before = Program.parse(text).weights
    program, _ = fold(text)
    assert affine(program) == [[]]
    assert torch.allclose(program.weights["up.bias"], before["up"] @ before["h"], atol=1e-14)
    assert torch.allclose(program.weights["c"], before["c"] + before["gate"] @ before["h"], atol=1e-14)


def test_a_bias_that_others_read_too_is_left(fold: Fold) -> None:
    text = program_of(
        X,
        f"{GH}, u: f64[6, 8], v: f64[6, 6], c: f64[6]",
        f"""{LAYER}
        m = aten.linear.default(n, u, c)
        r = aten.relu.default(m)
        y = aten.linear.default(r, v, c)""",
    )
    before = Program.parse(text).weights
    program, _ = fold(text)
    assert affine(program) == [[]]
    assert torch.equal(program.weights["c"], before["c"])


@pytest.mark.parametrize("bias", ["c: f64[6]", "c: f64[1, 6]"])
def test_addmm(fold: Fold, bias: str) -> None:
    text = program_of(
        X,
        f"{GH}, w: f64[8, 6], {bias}",
        f"""{LAYER}
        rows = aten.sym_size.int(x, 0)
        flat = aten.view.default(n, [-1, 8])
        m = aten.addmm.default(c, flat, w)
        y = aten.view.default(m, [rows, -1, 6])""",
    )
    before = Program.parse(text).weights
    program, report = fold(text)
    assert len(report.rewritten) == 1
    assert affine(program) == [[]]
    assert torch.equal(program.weights["w"], before["w"] * before["g"][:, None])


def test_a_tied_head_is_parted(fold: Fold) -> None:
    text = program_of(
        "ids: i64[batch, sequence]",
        "g: f64[8], table: f64[9, 8]",
        """x = aten.embedding.default(table, ids)
        n = aten.rms_norm.default(x, [8], g, 0.01)
        logits = aten.linear.default(n, table)""",
        "logits",
    )
    before = Program.parse(text).weights
    program, report = fold(text)
    assert affine(program) == [[]]
    assert report.notes == ["'table' is untied for logits: 0.0 MB more"]
    assert torch.equal(program.weights["table"], before["table"])
    assert torch.equal(program.weights["table.untied"], before["table"] * before["g"])


def test_norms_that_share_a_gain(fold: Fold) -> None:
    text = program_of(
        X,
        "g: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{RMS}
        a = aten.linear.default(n, u)
        m = aten.rms_norm.default(a, [8], g, 0.01)
        y = aten.linear.default(m, v)""",
    )
    program, report = fold(text)
    assert affine(program) == [[], []]
    assert [e.where for e in report.rewritten] == ["n", "m"]


def test_a_gain_shared_with_a_norm_that_cannot_give_it_up_stays(fold: Fold) -> None:
    text = program_of(
        X,
        "g: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{RMS}
        a = aten.linear.default(n, u)
        m = aten.rms_norm.default(a, [8], g, 0.01)
        y = aten.silu.default(m)""",
    )
    program, report = fold(text)
    assert affine(program) == [["g"], ["g"]]
    assert [(e.where, e.what) for e in report.skipped] == [(n, "y: silu bends each element") for n in ("n", "m")]


def test_one_gain_with_two_biases_stays(fold: Fold) -> None:
    text = program_of(
        X,
        f"{GH}, k: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{LAYER}
        a = aten.linear.default(n, u)
        m = aten.layer_norm.default(a, [8], g, k, 0.01)
        y = aten.linear.default(m, v)""",
    )
    program, report = fold(text)
    assert affine(program) == [["g", "h"], ["g", "k"]]
    assert [e.what for e in report.skipped] == ["it shares its gain with a norm that has another bias"] * 2


CONV = """t = aten.transpose.int(n, 1, 2)
        y = aten.conv1d.default(t, w, c, [1], [1])"""


def test_a_bias_before_a_padded_convolution_stays_divided_by_the_gain(fold: Fold) -> None:
    text = program_of(X, f"{GH}, w: f64[5, 8, 3], c: f64[5]", f"{LAYER}\n{CONV}")
    before = Program.parse(text).weights
    program, report = fold(text)
    assert affine(program) == [["h"]]
    assert len(report.rewritten) == 1
    assert torch.allclose(program.weights["h"], before["h"] / before["g"], atol=1e-14)
    assert torch.equal(program.weights["w"], before["w"] * before["g"][:, None])


def test_a_gain_of_zero_cannot_divide_the_bias(fold: Fold) -> None:
    text = program_of(X, f"{GH}, w: f64[5, 8, 3], c: f64[5]", f"{LAYER}\n{CONV}")
    program, report = fold(text, {"g": torch.tensor([0.0, 1, 2, 3, -1, -2, 0.5, 2], dtype=torch.float64)})
    assert affine(program) == [["g", "h"]]
    assert [e.what for e in report.skipped] == [
        "its bias does not fit all that read it, and cannot stay: a gain is zero"
    ]


def test_a_gain_of_zero_is_folded_where_its_bias_fits(fold: Fold) -> None:
    text = program_of(X, f"{GH}, w: f64[5, 8]", f"{LAYER}\ny = aten.linear.default(n, w)")
    program, report = fold(text, {"g": torch.tensor([0.0, 1, 2, 3, -1, -2, 0.5, 2], dtype=torch.float64)})
    assert affine(program) == [[]]
    assert report.skipped == []


def test_experts(fold: Fold) -> None:
    text = program_of("x: f64[4, sequence, 8]", f"{GH}, w: f64[4, 8, 6]", f"{LAYER}\ny = aten.bmm.default(n, w)")
    before = Program.parse(text).weights
    program, _ = fold(text)
    assert affine(program) == [["h"]]
    assert torch.equal(program.weights["w"], before["w"] * before["g"][:, None])


def test_a_bias_alone_stays(fold: Fold) -> None:
    text = program_of(
        X,
        "h: f64[8], w: f64[5, 8]",
        "n = aten.layer_norm.default(x, [8], None, h, 0.01)\ny = aten.linear.default(n, w)",
    )
    program, report = fold(text)
    assert affine(program) == [["h"]]
    assert [e.what for e in report.skipped] == ["n: divides each vector by its length"]


def test_heads_that_read_one_row_of_a_weight_each(fold: Fold) -> None:
    """A gain over one head's channels, which a product of all heads reads: the gain is tiled over the heads."""
    text = program_of(
        X,
        "g: f64[4], w: f64[5, 8]",
        """h = aten.unflatten.int(x, -1, [2, 4])
        n = aten.rms_norm.default(h, [4], g, 0.01)
        f = aten.flatten.using_ints(n, 2, 3)
        y = aten.linear.default(f, w)""",
    )
    before = Program.parse(text).weights
    program, report = fold(text)
    if report.rewritten:
        assert torch.equal(program.weights["w"], before["w"] * before["g"].repeat(2))
    assert affine(program) == [[]] if report.rewritten else [["g"]]


@pytest.mark.parametrize(
    ("between", "reason"),
    [
        ("r = aten.relu.default(n)", "between it and y, r: relu bends each element"),
        ("r = aten.silu.default(n)", "r: silu bends each element"),
        ("r = aten.add.Tensor(n, x)", "n: divides each vector by its length"),
        ("r = aten.mul.Tensor(n, stem_bias)", "between it and y, r: its gain scales each channel"),
        ("r = aten.softmax.int(n, -1)", "r: softmax"),
    ],
)
def test_what_stands_between(fold: Fold, between: str, reason: str) -> None:
    text = program_of(
        X, "g: f64[8], stem_bias: f64[8], w: f64[3, 8]", f"{RMS}\n{between}\ny = aten.linear.default(r, w)"
    )
    program, report = fold(text)
    assert affine(program) == [["g"]]
    assert [e.what for e in report.skipped] == [reason]


def test_a_residual_that_starts_behind_the_norm(fold: Fold) -> None:
    text = program_of(
        X,
        f"{GH}, w: f64[8, 8], head: f64[3, 8]",
        f"""{LAYER}
        a = aten.linear.default(n, w)
        r = aten.add.Tensor(n, a)
        y = aten.linear.default(r, head)""",
    )
    program, report = fold(text)
    assert affine(program) == [["g", "h"]]
    assert [e.what for e in report.skipped] == ["its channels also meet a, which is no product that reads them"]


def test_a_norm_that_is_returned(fold: Fold) -> None:
    text = program_of(X, "g: f64[8], w: f64[3, 8]", f"{RMS}\ny = aten.linear.default(n, w)", "y n")
    program, report = fold(text)
    assert affine(program) == [["g"]]
    assert [e.what for e in report.skipped] == ["output: is returned as 'n'"]


def test_norms_without_anything_to_fold_are_not_spoken_of(fold: Fold) -> None:
    _, report = fold(
        program_of(X, "w: f64[3, 8]", "n = aten.rms_norm.default(x, [8], None, 0.01)\ny = aten.linear.default(n, w)")
    )
    assert report.rewritten == report.skipped == []


def test_bfloat16_is_rounded_once(feeds: Callable[..., dict[str, Tensor]]) -> None:
    text = textwrap.dedent("""\
        def main(ids: i64[batch], *, t: bf16[9, 8], g: bf16[8], h: bf16[8], w: bf16[5, 8], c: bf16[5]):
            x = aten.embedding.default(t, ids)
            n = aten.layer_norm.default(x, [8], g, h, 0.01)
            y = aten.linear.default(n, w, c)
            return {"y": y}""")
    before = {k: v.double() for k, v in Program.parse(text).weights.items()}
    program = Program.parse(text)
    PassManager([FoldNormAffine()]).run(program)
    assert torch.equal(program.weights["w"], (before["w"] * before["g"]).bfloat16())
    assert torch.equal(program.weights["c"], (before["c"] + before["w"] @ before["h"]).bfloat16())
