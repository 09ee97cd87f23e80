"""fold-norm-affine: what gains and biases are folded into, what keeps them, and that the function stays."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.norm.fold_norm_affine import FoldNormAffine

X = "x: f64[batch, sequence, 8]"
GH = "g: f64[8], h: f64[8]"
LAYER = "n = aten.layer_norm.default(x, [8], g, h, 0.01)"
BARE = "n = aten.layer_norm.default(x, [8], None, h, 0.01)"
RMS = "n = aten.rms_norm.default(x, [8], g, 0.01)"
READ = "y = aten.linear.default(n, w)"
READ_TWICE = """y = aten.linear.default(n, up)
                z = aten.linear.default(n, gate, c)"""
CONV = """t = aten.transpose.int(n, 1, 2)
          y = aten.conv1d.default(t, w, c, [1], [1])"""
GAIN_WITH_ZERO = {"g": torch.tensor([0.0, 1, 2, 3, -1, -2, 0.5, 2], dtype=torch.float64)}

Fold = Callable[..., tuple[Program, Report, dict[str, Tensor]]]


@pytest.fixture
def fold(text: Callable[..., str], applied: Callable[..., tuple[Program, Report, dict[str, Tensor]]]) -> Fold:
    """Fold the norms of a program; the program, the report and the weights as they were.

    An input x is made by a weight from what is fed.
    """

    def check(
        weights: str, body: str, outputs: str = "y", inputs: str = X, values: dict[str, Tensor] | None = None
    ) -> tuple[Program, Report, dict[str, Tensor]]:
        if inputs.startswith("x"):
            inputs, weights = f"i{inputs[1:]}", f"stem: f64[8, 8], {weights}"
            body = f"x = aten.linear.default(i, stem)\n{body}"
        return applied(FoldNormAffine(), text(inputs, weights, body, outputs), values)

    return check


def affine(program: Program) -> list[list[str]]:
    """The gain and bias that each norm still has, by key."""
    found = []
    for node in program.nodes:
        if "norm" in str(node.target):
            vectors = [n for n in node.all_input_nodes if program.is_weight(n)]
            found.append([program.key(v) for v in vectors])
    return found


def test_a_gain_goes_into_all_that_reads_it(fold: Fold) -> None:
    program, report, before = fold(
        "g: f64[8], up: f64[6, 8], gate: f64[5, 8], c: f64[5]", f"{RMS}\n{READ_TWICE}", "y z"
    )
    assert affine(program) == [[]]
    assert "g" not in program.weights
    assert torch.equal(program.weights["up"], before["up"] * before["g"])
    assert torch.equal(program.weights["gate"], before["gate"] * before["g"])
    assert torch.equal(program.weights["c"], before["c"])
    assert [(e.where, e.what) for e in report.rewritten] == [("n", "folded into what reads it")]
    assert report.skipped == []
    assert (before["g"] < 0).any()  # gains are of both signs here


def test_a_bias_goes_into_biases_and_makes_those_that_are_missing(fold: Fold) -> None:
    program, _, before = fold(f"{GH}, up: f64[6, 8], gate: f64[5, 8], c: f64[5]", f"{LAYER}\n{READ_TWICE}", "y z")
    assert affine(program) == [[]]
    assert torch.allclose(program.weights["up.bias"], before["up"] @ before["h"], atol=1e-14)
    assert torch.allclose(program.weights["c"], before["c"] + before["gate"] @ before["h"], atol=1e-14)


def test_a_bias_that_others_read_too_is_left(fold: Fold) -> None:
    program, _, before = fold(
        f"{GH}, u: f64[6, 8], v: f64[6, 6], c: f64[6]",
        f"""{LAYER}
        m = aten.linear.default(n, u, c)
        r = aten.relu.default(m)
        y = aten.linear.default(r, v, c)""",
    )
    assert affine(program) == [[]]
    assert torch.equal(program.weights["c"], before["c"])


@pytest.mark.parametrize("bias", ["c: f64[6]", "c: f64[1, 6]"])
def test_addmm(fold: Fold, bias: str) -> None:
    program, report, before = fold(
        f"{GH}, w: f64[8, 6], {bias}",
        f"""{LAYER}
        rows = aten.sym_size.int(x, 0)
        flat = aten.view.default(n, [-1, 8])
        m = aten.addmm.default(c, flat, w)
        y = aten.view.default(m, [rows, -1, 6])""",
    )
    assert len(report.rewritten) == 1
    assert affine(program) == [[]]
    assert torch.equal(program.weights["w"], before["w"] * before["g"][:, None])


def test_a_tied_head_is_parted(fold: Fold) -> None:
    program, report, before = fold(
        "g: f64[8], table: f64[9, 8]",
        """x = aten.embedding.default(table, ids)
        n = aten.rms_norm.default(x, [8], g, 0.01)
        logits = aten.linear.default(n, table)""",
        "logits",
        "ids: i64[batch, sequence]",
    )
    assert affine(program) == [[]]
    assert report.notes == ["'table' is untied for logits: 0.0 MB more"]
    assert torch.equal(program.weights["table"], before["table"])
    assert torch.equal(program.weights["table.untied"], before["table"] * before["g"])


def test_norms_that_share_a_gain(fold: Fold) -> None:
    program, report, _ = fold(
        "g: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{RMS}
        a = aten.linear.default(n, u)
        m = aten.rms_norm.default(a, [8], g, 0.01)
        y = aten.linear.default(m, v)""",
    )
    assert affine(program) == [[], []]
    assert [e.where for e in report.rewritten] == ["n", "m"]


def test_a_gain_shared_with_a_norm_that_cannot_give_it_up_stays(fold: Fold) -> None:
    program, report, _ = fold(
        "g: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{RMS}
        a = aten.linear.default(n, u)
        m = aten.rms_norm.default(a, [8], g, 0.01)
        y = aten.silu.default(m)""",
    )
    assert affine(program) == [["g"], ["g"]]
    assert [(e.where, e.what) for e in report.skipped] == [(n, "y: silu bends each element") for n in ("n", "m")]


def test_one_gain_with_two_biases_stays(fold: Fold) -> None:
    program, report, _ = fold(
        f"{GH}, k: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{LAYER}
        a = aten.linear.default(n, u)
        m = aten.layer_norm.default(a, [8], g, k, 0.01)
        y = aten.linear.default(m, v)""",
    )
    assert affine(program) == [["g", "h"], ["g", "k"]]
    assert [e.what for e in report.skipped] == ["it shares its gain with a norm that has another bias"] * 2


def test_a_bias_before_a_padded_convolution_stays_divided_by_the_gain(fold: Fold) -> None:
    program, report, before = fold(f"{GH}, w: f64[5, 8, 3], c: f64[5]", f"{LAYER}\n{CONV}")
    assert affine(program) == [["h"]]
    assert len(report.rewritten) == 1
    assert torch.allclose(program.weights["h"], before["h"] / before["g"], atol=1e-14)
    assert torch.equal(program.weights["w"], before["w"] * before["g"][:, None])


def test_a_gain_of_zero_cannot_divide_the_bias(fold: Fold) -> None:
    program, report, _ = fold(f"{GH}, w: f64[5, 8, 3], c: f64[5]", f"{LAYER}\n{CONV}", values=GAIN_WITH_ZERO)
    assert affine(program) == [["g", "h"]]
    assert [e.what for e in report.skipped] == [
        "its bias would have to stay, for y has no one bias for all that it computes; and it cannot: a gain is zero"
    ]


def test_a_gain_of_zero_is_folded_where_its_bias_fits(fold: Fold) -> None:
    program, report, _ = fold(f"{GH}, w: f64[5, 8]", f"{LAYER}\n{READ}", values=GAIN_WITH_ZERO)
    assert affine(program) == [[]]
    assert report.skipped == []


def test_experts(fold: Fold) -> None:
    program, _, before = fold(
        f"{GH}, w: f64[4, 8, 6]", f"{LAYER}\ny = aten.bmm.default(n, w)", inputs="x: f64[4, sequence, 8]"
    )
    assert affine(program) == [["h"]]
    assert torch.equal(program.weights["w"], before["w"] * before["g"][:, None])


def test_a_bias_without_a_gain(fold: Fold) -> None:
    program, report, before = fold(
        "h: f64[8], up: f64[5, 8], gate: f64[6, 8], c: f64[6]", f"{BARE}\n{READ_TWICE}", "y z"
    )
    assert affine(program) == [[]]
    assert set(program.weights) == {"stem", "up", "up.bias", "gate", "c"}
    assert torch.equal(program.weights["up"], before["up"])
    assert torch.allclose(program.weights["up.bias"], before["up"] @ before["h"], atol=1e-14)
    assert torch.allclose(program.weights["c"], before["c"] + before["gate"] @ before["h"], atol=1e-14)
    assert len(report.rewritten) == 1
    assert report.skipped == []


def test_norms_that_share_a_bias_and_have_no_gain(fold: Fold) -> None:
    program, _, _ = fold(
        "h: f64[8], u: f64[8, 8], v: f64[3, 8]",
        f"""{BARE}
        a = aten.linear.default(n, u)
        m = aten.layer_norm.default(a, [8], None, h, 0.01)
        y = aten.linear.default(m, v)""",
    )
    assert affine(program) == [[], []]


@pytest.mark.parametrize(
    ("readers", "reason"),
    [
        (CONV, "it has no gain to fold, and its bias stays: y has no one bias for all that it computes"),
        ("s = aten.silu.default(n)\ny = aten.linear.default(s, w)", "s: silu bends each element"),
        ("s = aten.relu.default(n)\ny = aten.linear.default(s, w)", "between it and y, s: relu bends each element"),
    ],
    ids=["a convolution", "silu", "relu"],
)
def test_a_bias_without_a_gain_that_stays(readers: str, reason: str, fold: Fold) -> None:
    weight = "w: f64[5, 8, 3]" if "conv" in readers else "w: f64[5, 8]"
    program, report, _ = fold(f"h: f64[8], {weight}, c: f64[5]", f"{BARE}\n{readers}")
    assert affine(program) == [["h"]]
    assert "h.gain" not in program.weights
    assert [e.what for e in report.skipped] == [reason]


@pytest.mark.parametrize(
    ("norm", "reason"),
    [
        ("n = aten.rms_norm.default(x, [8], k, 0.01)", "its weight k is computed; raise-norms stores it"),
        ("n = aten.layer_norm.default(x, [8], g, k, 0.01)", "its bias k is computed; raise-norms stores it"),
        ("n = aten.layer_norm.default(x, [8], k, g, 0.01)", "its weight k is computed; raise-norms stores it"),
    ],
)
def test_what_is_computed_is_no_weight_to_fold(norm: str, reason: str, fold: Fold) -> None:
    program, report, before = fold("g: f64[8], w: f64[3, 8]", f"k = aten.add.Tensor(g, 1.0)\n{norm}\n{READ}")
    assert torch.equal(program.weights["w"], before["w"])
    assert [e.what for e in report.skipped] == [reason]


def test_heads_that_read_one_row_of_a_weight_each(fold: Fold) -> None:
    """A gain over one head's channels, which a product of all heads reads: the gain is tiled over the heads."""
    program, report, before = fold(
        "g: f64[4], w: f64[5, 8]",
        """h = aten.unflatten.int(x, -1, [2, 4])
        n = aten.rms_norm.default(h, [4], g, 0.01)
        f = aten.flatten.using_ints(n, 2, 3)
        y = aten.linear.default(f, w)""",
    )
    assert len(report.rewritten) == 1
    assert torch.equal(program.weights["w"], before["w"] * before["g"].repeat(2))
    assert affine(program) == [[]]


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
    program, report, _ = fold(
        "g: f64[8], stem_bias: f64[8], w: f64[3, 8]", f"{RMS}\n{between}\ny = aten.linear.default(r, w)"
    )
    assert affine(program) == [["g"]]
    assert [e.what for e in report.skipped] == [reason]


def test_a_residual_that_starts_behind_the_norm(fold: Fold) -> None:
    program, report, _ = fold(
        f"{GH}, w: f64[8, 8], head: f64[3, 8]",
        f"""{LAYER}
        a = aten.linear.default(n, w)
        r = aten.add.Tensor(n, a)
        y = aten.linear.default(r, head)""",
    )
    assert affine(program) == [["g", "h"]]
    assert [e.what for e in report.skipped] == ["its channels also meet a, which is no product that reads them"]


def test_a_norm_that_is_returned(fold: Fold) -> None:
    program, report, _ = fold("g: f64[8], w: f64[3, 8]", f"{RMS}\n{READ}", "y n")
    assert affine(program) == [["g"]]
    assert [e.what for e in report.skipped] == ["output: is returned as 'n'"]


def test_norms_without_anything_to_fold_are_not_spoken_of(fold: Fold) -> None:
    _, report, _ = fold("w: f64[3, 8]", f"n = aten.rms_norm.default(x, [8], None, 0.01)\n{READ}")
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


@pytest.mark.parametrize("factor", ["neg.default(n)", "mul.Tensor(n, 2.0)", "mul.Tensor(n, 0.0)", "mul.Tensor(n, t)"])
def test_a_bias_stays_where_a_factor_follows_it(fold: Fold, factor: str) -> None:
    body = f"""{LAYER}
               m = aten.{factor}
               y = aten.linear.default(m, w)"""
    program, report, _ = fold(f"{GH}, w: f64[6, 8]", body, inputs=f"{X}, t: f64[batch, sequence, 1]")
    assert affine(program) == [["h"]]  # the gain is folded
    assert report.notes == ["n keeps its bias: m computes what y reads"]
