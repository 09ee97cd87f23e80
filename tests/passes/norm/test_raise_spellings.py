"""RaiseNorms: every spelling of an RMS norm against a plain formula, and what is none."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.norms import rms

from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.pass_manager import PassManager, op_counts
from qcompile.passes.norm.raise_norms import RaiseNorms

SQUARES = {"pow": "aten.pow.Tensor_Scalar(x, 2)", "mul": "aten.mul.Tensor(x, x)", "square": "aten.square.default(x)"}
MEANS = {
    "mean": ["m = aten.mean.dim(p, [{axis}], True)"],
    "sum/d": ["t = aten.sum.dim_IntList(p, [{axis}], True)", "m = aten.div.Tensor(t, 6)"],
    "sum·(1/d)": ["t = aten.sum.dim_IntList(p, [{axis}], True)", f"m = aten.mul.Tensor(t, {1 / 6})"],
}
EPS = {
    "scalar": ["a = aten.add.Tensor(m, {eps})"],
    "left": ["k = aten.full.default([], {eps}, dtype=torch.float64)", "a = aten.add.Tensor(k, m)"],
    "weight": ["a = aten.add.Tensor(m, e)"],
}
PRODUCTS = {
    "rsqrt": ["r = aten.rsqrt.default(a)", "s = aten.mul.Tensor(x, r)"],
    "rsqrt first": ["r = aten.rsqrt.default(a)", "s = aten.mul.Tensor(r, x)"],
    "pow": ["r = aten.pow.Tensor_Scalar(a, -0.5)", "s = aten.mul.Tensor(x, r)"],
    "sqrt, div": ["r = aten.sqrt.default(a)", "s = aten.div.Tensor(x, r)"],
    "pow, div": ["r = aten.pow.Tensor_Scalar(a, 0.5)", "s = aten.div.Tensor(x, r)"],
    "reciprocal": ["q = aten.sqrt.default(a)", "r = aten.reciprocal.default(q)", "s = aten.mul.Tensor(x, r)"],
}
GAINS = {
    "right": (["y = aten.mul.Tensor(s, g)"], lambda g: g),
    "left": (["y = aten.mul.Tensor(g, s)"], lambda g: g),
    "plus one": (["o = aten.add.Tensor(g, 1.0)", "y = aten.mul.Tensor(s, o)"], lambda g: g + 1),
    "exp": (["o = aten.exp.default(g)", "y = aten.mul.Tensor(o, s)"], torch.exp),
    "none": (["y = aten.neg.default(s)"], lambda g: -torch.ones_like(g)),
}
SPELLINGS = list(itertools.product(SQUARES, MEANS, EPS, PRODUCTS, GAINS))


@given(st.sampled_from(SPELLINGS), st.sampled_from([1e-12, 1e-6, 0.3]), st.sampled_from([-1, 2]), st.integers(0, 99))
def test_every_spelling(spelling: tuple[str, ...], eps: float, axis: int, seed: int) -> None:
    square, mean, added, product, gain = spelling
    lines = [f"p = {SQUARES[square]}", *MEANS[mean], *EPS[added], *PRODUCTS[product], *GAINS[gain][0]]
    body = "\n".join(f"    {line}" for line in lines).format(eps=eps, axis=axis)
    head, tail = (
        "def main(x: f64[2, 3, 6], *, g: f64[6], e: f64[1]):",
        '    z = aten.mul.Tensor(y, e)\n    return {"z": z}',
    )
    text = "\n".join([head, body, tail])
    scale = torch.tensor([eps], dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    given_gain = torch.randn(6, dtype=torch.float64, generator=generator)
    program = Program.parse(text, {"g": given_gain, "e": scale})
    x = torch.randn(2, 3, 6, dtype=torch.float64, generator=generator) * 3
    expected = rms(x, eps) * GAINS[gain][1](given_gain) * scale
    (report,) = PassManager([RaiseNorms()]).run(program)
    counts = op_counts(program)
    assert counts["aten.rms_norm.default"] == 1
    assert len(report.rewritten) == 1
    assert counts.total() == (3 if gain == "none" else 2)
    assert drift({"z": program(x)}, {"z": expected}) <= 1e-12


@pytest.mark.parametrize(
    ("centre", "mean"),
    [
        ("aten.mean.dim(x, [1], True)", "aten.div.Tensor(t, 6)"),
        ("aten.mean.dim(x, [-1], True)", "aten.div.Tensor(t, 7)"),
        ("aten.mean.dim(x, [-1], True)", "aten.mul.Tensor(t, 0.1)"),
    ],
)
def test_a_mean_over_something_else_is_not_taken_for_one(centre: str, mean: str) -> None:
    """Less a mean over tokens it is not centred, and a sum over another number than the width is no mean."""
    program = Program.parse(f"""def main(x: f64[2, 6, 6]):
    e = {centre}
    c = aten.sub.Tensor(x, e)
    p = aten.square.default(c)
    t = aten.sum.dim_IntList(p, [-1], True)
    m = {mean}
    a = aten.add.Tensor(m, 0.01)
    r = aten.rsqrt.default(a)
    y = aten.mul.Tensor(c, r)
    return {{"y": y}}""")
    x = torch.randn(2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    expected = program(x)
    PassManager([RaiseNorms()]).run(program)
    assert op_counts(program)["aten.layer_norm.default"] == 0
    assert drift({"y": program(x)}, {"y": expected}) <= 1e-12
