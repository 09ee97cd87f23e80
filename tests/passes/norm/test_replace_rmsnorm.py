"""replace-rmsnorm: RMS norms alone are replaced, and just as raise-norms does it."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest

from qcompile import run_passes
from qcompile.ir.program import Program
from qcompile.passes.norm.replace_rmsnorm import ReplaceRmsNorm

RMS = """\
    def main(x: f64[2, 8], *, g: f64[8] = "norm.weight"):
        p: f64[2, 8] = aten.pow.Tensor_Scalar(x, 2)
        m: f64[2, 1] = aten.mean.dim(p, [-1], True)
        a: f64[2, 1] = aten.add.Tensor(m, 0.01)
        r: f64[2, 1] = aten.rsqrt.default(a)
        s: f64[2, 8] = aten.mul.Tensor(x, r)
        o: f64[8] = aten.add.Tensor(g, 1.0)
        y: f64[2, 8] = aten.mul.Tensor(o, s)
        return {"y": y}"""

LAYER = """\
    def main(x: f64[2, 8], *, g: f64[8]):
        u: f64[2, 1] = aten.mean.dim(x, [-1], True)
        c: f64[2, 8] = aten.sub.Tensor(x, u)
        p: f64[2, 8] = aten.pow.Tensor_Scalar(c, 2)
        m: f64[2, 1] = aten.mean.dim(p, [-1], True)
        a: f64[2, 1] = aten.add.Tensor(m, 0.01)
        r: f64[2, 1] = aten.rsqrt.default(a)
        s: f64[2, 8] = aten.mul.Tensor(c, r)
        y: f64[2, 8] = aten.mul.Tensor(g, s)
        return {"y": y}"""


def test_rms_norm(golden: Callable[..., Any]) -> None:
    report = golden(
        ReplaceRmsNorm(),
        RMS,
        """\
        def main(x: f64[2, 8], *, norm_weight_plus_one: f64[8] = "norm.weight.plus_one"):
            rms_norm: f64[2, 8] = aten.rms_norm.default(x, [8], norm_weight_plus_one, 0.01)
            return {"y": rms_norm}""",
    )
    assert report.rewritten[0].what.startswith("rms_norm over 8, eps 0.01")


def test_it_does_what_raise_norms_does() -> None:
    texts = []
    for passes in ("raise-norms", "replace-rmsnorm"):
        program = Program.parse(textwrap.dedent(RMS))
        run_passes(program, passes)
        texts.append(str(program))
    assert texts[0] == texts[1]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (LAYER, "a layer norm; raise-norms raises it"),
        (RMS.replace("aten.mean.dim(p", "aten.sum.dim_IntList(p"), "an l2 norm; raise-norms raises it"),
        (RMS.replace("mean.dim(p, [-1]", "mean.dim(p, [0]").replace("f64[2, 1]", "f64[1, 8]"), "m runs over axes [0], not over the last"),
    ],
    ids=["a layer norm", "an l2 norm", "another axis"],
)  # fmt: skip
def test_near_miss(text: str, reason: str, left_alone: Callable[..., Any]) -> None:
    assert left_alone(ReplaceRmsNorm(), text) == [reason]


def test_no_root(left_alone: Callable[..., Any]) -> None:
    assert left_alone(ReplaceRmsNorm(), RMS.replace("aten.rsqrt", "aten.relu")) == []
