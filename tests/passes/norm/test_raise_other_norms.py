"""Norms by a sum of squares, as linear attention applies to queries and keys, and norms over other axes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from qcompile.passes.norm.raise_norms import RaiseNorms

BEFORE = """\
        def main(x: f64[2, 3, 16], *, g: f64[16]):
            p: f64[2, 3, 16] = aten.mul.Tensor(x, x)  # q
            m: f64[2, 3, 1] = aten.sum.dim_IntList(p, [-1], True)  # q
            a: f64[2, 3, 1] = aten.add.Tensor(m, 0.32)  # q
            r: f64[2, 3, 1] = aten.rsqrt.default(a)  # q
            s: f64[2, 3, 16] = aten.mul.Tensor(x, r)  # q
            t: f64[2, 3, 16] = aten.mul.Tensor(s, g)
            y: f64[2, 3, 16] = aten.add.Tensor(t, g)
            return {"y": y}"""


def test_a_sum_of_squares(golden: Callable[..., Any]) -> None:
    report = golden(
        RaiseNorms(),
        BEFORE,
        """\
        def main(x: f64[2, 3, 16], *, g: f64[16]):
            rms_norm: f64[2, 3, 16] = aten.rms_norm.default(x, [16], None, 0.02)  # q
            mul_tensor: f64[2, 3, 16] = aten.mul.Tensor(rms_norm, 0.25)  # q
            t: f64[2, 3, 16] = aten.mul.Tensor(mul_tensor, g)
            y: f64[2, 3, 16] = aten.add.Tensor(t, g)
            return {"y": y}""",
    )
    assert report.rewritten[0].what == "rms_norm over 16, eps 0.02, times 0.25: an l2 norm"


@pytest.mark.parametrize(
    ("old", "new", "reasons"),
    [
        ("[-1], True", "[1], True", ["m runs over axes [1], not over the last"]),
        ("            a: f64[2, 3, 1] = aten.add.Tensor(m, 0.32)  # q\n", "", []),
        ("aten.sum.dim_IntList(p, [-1], True)", "aten.amax.default(p, [-1], True)", []),
    ],
    ids=["another axis", "a length", "a maximum"],
)
def test_what_is_no_l2_norm(old: str, new: str, reasons: list[str], left_alone: Callable[..., Any]) -> None:
    text = BEFORE.replace(old, new)
    if "add.Tensor(m" not in text:
        text = text.replace("rsqrt.default(a)", "rsqrt.default(m)")
    if "[1]" in new:
        text = text.replace("[2, 3, 1]", "[2, 1, 16]")
    assert left_alone(RaiseNorms(), text) == reasons


def test_norms_over_other_axes_are_left_alone(left_alone: Callable[..., Any]) -> None:
    text = """\
        def main(x: f32[2, 4, 3, 3], *, g: f32[4], b: f32[4], m: f32[4], v: f32[4]):
            n: f32[2, 4, 3, 3] = aten.batch_norm.default(x, g, b, m, v, False, 0.1, 0.01, False)
            y: f32[2, 4, 3, 3] = aten.group_norm.default(n, 2, g, b, 0.01, False)
            return {"y": y}"""
    assert left_alone(RaiseNorms(), text) == [
        "over stored statistics, a factor and a shift a channel: no norm of what it reads",
        "runs over all positions, not over the last axis alone",
    ]
