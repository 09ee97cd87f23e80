"""RaiseNorms: golden IR, near misses, and real architectures."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles.norms import rms

from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.pass_manager import PassManager
from qcompile.passes.norm.raise_norms import RaiseNorms

LLAMA = """\
    def main(x: f32[batch, sequence, 8], *, g: f32[8] = "norm.weight"):
        p: f32[batch, sequence, 8] = aten.pow.Tensor_Scalar(x, 2)  # norm
        m: f32[batch, sequence, 1] = aten.mean.dim(p, [-1], True)  # norm
        a: f32[batch, sequence, 1] = aten.add.Tensor(m, 0.01)  # norm
        r: f32[batch, sequence, 1] = aten.rsqrt.default(a)  # norm
        s: f32[batch, sequence, 8] = aten.mul.Tensor(x, r)  # norm
        y: f32[batch, sequence, 8] = aten.mul.Tensor(g, s)  # norm
        z: f32[batch, sequence, 8] = aten.relu.default(y)
        return {"z": z}"""


def test_llama(golden: Callable[..., Any]) -> None:
    report = golden(
        RaiseNorms(),
        LLAMA,
        """\
        def main(x: f32[batch, sequence, 8], *, g: f32[8] = "norm.weight"):
            rms_norm: f32[batch, sequence, 8] = aten.rms_norm.default(x, [8], g, 0.01)  # norm
            z: f32[batch, sequence, 8] = aten.relu.default(rms_norm)
            return {"z": z}""",
    )
    assert [(e.where, e.what) for e in report.rewritten] == [("norm (rms_norm)", "rms_norm over 8, eps 0.01")]


def test_gemma_in_bfloat16_keeps_one_plus_gain_in_float32(golden: Callable[..., Any]) -> None:
    report = golden(
        RaiseNorms(),
        """\
        def main(x: bf16[2, 8], *, g: bf16[8] = "norm.weight"):
            c: f32[2, 8] = aten.to.dtype(x, torch.float32)
            p: f32[2, 8] = aten.pow.Tensor_Scalar(c, 2)
            m: f32[2, 1] = aten.mean.dim(p, [-1], True)
            a: f32[2, 1] = aten.add.Tensor(m, 1e-06)
            r: f32[2, 1] = aten.rsqrt.default(a)
            s: f32[2, 8] = aten.mul.Tensor(c, r)
            w: f32[8] = aten.to.dtype(g, torch.float32)
            o: f32[8] = aten.add.Tensor(w, 1.0)
            t: f32[2, 8] = aten.mul.Tensor(s, o)
            y: bf16[2, 8] = aten.to.dtype(t, torch.bfloat16)
            return {"y": y}""",
        """\
        def main(x: bf16[2, 8], *, norm_weight_plus_one: f32[8] = "norm.weight.plus_one"):
            to_dtype: f32[2, 8] = aten.to.dtype(x, torch.float32)
            rms_norm: f32[2, 8] = aten.rms_norm.default(to_dtype, [8], norm_weight_plus_one, 1e-06)
            to_dtype_1: bf16[2, 8] = aten.to.dtype(rms_norm, torch.bfloat16)
            return {"y": to_dtype_1}""",
    )
    assert "'norm.weight.plus_one' computed once and stored" in report.rewritten[0].what


def test_llama_in_bfloat16_rounds_once(golden: Callable[..., Any]) -> None:
    before = """\
        def main(x: bf16[2, 8], *, g: bf16[8]):
            c: f32[2, 8] = aten.to.dtype(x, torch.float32)
            p: f32[2, 8] = aten.pow.Tensor_Scalar(c, 2)
            m: f32[2, 1] = aten.mean.dim(p, [-1], True)
            a: f32[2, 1] = aten.add.Tensor(m, 0.001)
            r: f32[2, 1] = aten.rsqrt.default(a)
            s: f32[2, 8] = aten.mul.Tensor(c, r)
            h: bf16[2, 8] = aten.to.dtype(s, torch.bfloat16)
            y: bf16[2, 8] = aten.mul.Tensor(g, h)
            return {"y": y}"""
    golden(
        RaiseNorms(),
        before,
        """\
        def main(x: bf16[2, 8], *, g: bf16[8]):
            rms_norm: bf16[2, 8] = aten.rms_norm.default(x, [8], g, 0.001)
            return {"y": rms_norm}""",
    )
    program = Program.parse(textwrap.dedent(before))
    PassManager([RaiseNorms()]).run(program)
    x = torch.randn(2, 8).bfloat16()
    gain = program.weights["g"]
    exact = rms(x.double(), 0.001) * gain.double()
    assert torch.equal(program(x), exact.bfloat16())  # the exact value, rounded once


def test_layer_norm_without_bias(golden: Callable[..., Any]) -> None:
    report = golden(
        RaiseNorms(),
        """\
        def main(x: f64[2, 8], *, g: f64[8], b: f64[8]):
            u: f64[2, 1] = aten.mean.dim(x, [-1], True)
            c: f64[2, 8] = aten.sub.Tensor(x, u)
            p: f64[2, 8] = aten.pow.Tensor_Scalar(c, 2)
            m: f64[2, 1] = aten.mean.dim(p, [-1], True)
            d: f64[2, 8] = aten.sub.Tensor(x, u)
            a: f64[2, 1] = aten.add.Tensor(m, 1e-05)
            r: f64[2, 1] = aten.rsqrt.default(a)
            s: f64[2, 8] = aten.mul.Tensor(d, r)
            t: f64[2, 8] = aten.mul.Tensor(g, s)
            y: f64[2, 8] = aten.add.Tensor(t, b)
            return {"y": y}""",
        """\
        def main(x: f64[2, 8], *, g: f64[8], b: f64[8]):
            layer_norm: f64[2, 8] = aten.layer_norm.default(x, [8], g, b, 1e-05)
            return {"y": layer_norm}""",
    )
    assert report.rewritten[0].what == "layer_norm over 8, eps 1e-05"


def test_layer_norm_by_variance(golden: Callable[..., Any]) -> None:
    golden(
        RaiseNorms(),
        """\
        def main(x: f64[2, 8], *, g: f64[8]):
            u: f64[2, 1] = aten.mean.dim(x, [1], True)
            v: f64[2, 1] = aten.var.correction(x, [1], correction=0, keepdim=True)
            a: f64[2, 1] = aten.add.Tensor(v, 0.1)
            q: f64[2, 1] = aten.sqrt.default(a)
            c: f64[2, 8] = aten.sub.Tensor(x, u)
            s: f64[2, 8] = aten.div.Tensor(c, q)
            t: f64[2, 8] = aten.mul.Tensor(s, g)
            return {"y": t}""",
        """\
        def main(x: f64[2, 8], *, g: f64[8]):
            layer_norm: f64[2, 8] = aten.layer_norm.default(x, [8], g, None, 0.1)
            return {"y": layer_norm}""",
    )


def test_a_bias_after_an_rms_norm_stays_an_addition(golden: Callable[..., Any]) -> None:
    golden(
        RaiseNorms(),
        """\
        def main(x: f64[2, 8], *, g: f64[8], b: f64[8]):
            p: f64[2, 8] = aten.square.default(x)
            m: f64[2, 1] = aten.mean.dim(p, [-1], True)
            a: f64[2, 1] = aten.add.Tensor(m, 1e-05)
            r: f64[2, 1] = aten.pow.Tensor_Scalar(a, -0.5)
            s: f64[2, 8] = aten.mul.Tensor(r, x)
            t: f64[2, 8] = aten.mul.Tensor(s, g)
            y: f64[2, 8] = aten.add.Tensor(t, b)
            return {"y": y}""",
        """\
        def main(x: f64[2, 8], *, g: f64[8], b: f64[8]):
            rms_norm: f64[2, 8] = aten.rms_norm.default(x, [8], g, 1e-05)
            y: f64[2, 8] = aten.add.Tensor(rms_norm, b)
            return {"y": y}""",
    )


def test_a_computed_weight_of_an_operator_is_stored(golden: Callable[..., Any]) -> None:
    golden(
        RaiseNorms(),
        """\
        def main(x: f64[2, 8], *, g: f64[8] = "norm.weight", b: f64[8]):
            o: f64[8] = aten.add.Tensor(g, 1)
            y: f64[2, 8] = aten.layer_norm.default(x, [8], o, b, 0.1)
            o2: f64[8] = aten.add.Tensor(g, 1)
            z: f64[2, 8] = aten.layer_norm.default(y, [8], o2, b, 0.1)
            return {"z": z}""",
        """\
        def main(x: f64[2, 8], *, b: f64[8], norm_weight_plus_one: f64[8] = "norm.weight.plus_one"):
            y: f64[2, 8] = aten.layer_norm.default(x, [8], norm_weight_plus_one, b, 0.1)
            z: f64[2, 8] = aten.layer_norm.default(y, [8], norm_weight_plus_one, b, 0.1)
            return {"z": z}""",
    )


def test_a_weight_of_a_narrower_type_is_stored_in_the_wider() -> None:
    """T5 keeps its stream in float32 and its gains in bfloat16."""
    program = Program.parse(
        textwrap.dedent("""\
        def main(x: f32[2, 8], *, g: bf16[8]):
            p: f32[2, 8] = aten.pow.Tensor_Scalar(x, 2)
            m: f32[2, 1] = aten.mean.dim(p, [-1], True)
            a: f32[2, 1] = aten.add.Tensor(m, 0.001)
            r: f32[2, 1] = aten.rsqrt.default(a)
            s: f32[2, 8] = aten.mul.Tensor(x, r)
            h: bf16[2, 8] = aten.to.dtype(s, torch.bfloat16)
            y: bf16[2, 8] = aten.mul.Tensor(g, h)
            return {"y": y}""")
    )
    x, gain = torch.randn(2, 8), program.weights["g"]
    PassManager([RaiseNorms()]).run(program)
    assert "rms_norm: f32[2, 8] = aten.rms_norm.default(x, [8], g_f32, 0.001)" in str(program)
    assert torch.equal(program(x), (rms(x, 0.001) * gain.float()).bfloat16())


def test_a_result_in_the_wider_type_is_not_rounded(golden: Callable[..., Any]) -> None:
    golden(
        RaiseNorms(),
        """\
        def main(x: bf16[2, 8]):
            c: f32[2, 8] = aten.to.dtype(x, torch.float32)
            p: f32[2, 8] = aten.pow.Tensor_Scalar(c, 2)
            m: f32[2, 1] = aten.mean.dim(p, [-1], True)
            a: f32[2, 1] = aten.add.Tensor(m, 0.001)
            r: f32[2, 1] = aten.rsqrt.default(a)
            s: f32[2, 8] = aten.mul.Tensor(c, r)
            return {"s": s}""",
        """\
        def main(x: bf16[2, 8]):
            to_dtype: f32[2, 8] = aten.to.dtype(x, torch.float32)
            rms_norm: f32[2, 8] = aten.rms_norm.default(to_dtype, [8], None, 0.001)
            return {"s": rms_norm}""",
    )


def test_a_router_that_widens_keeps_its_cast() -> None:
    text = LLAMA.replace("f32", "bf16").replace(
        "z: bf16[batch, sequence, 8] = aten.relu.default(y)",
        "z: f32[batch, sequence, 8] = aten.to.dtype(y, torch.float32)",
    )
    program = Program.parse(textwrap.dedent(text))
    PassManager([RaiseNorms()]).run(program)
    assert "rms_norm: bf16[batch, sequence, 8]" in str(program)
    assert "z: f32[batch, sequence, 8] = aten.to.dtype(rms_norm, torch.float32)" in str(program)


def _change(*pairs: tuple[str, str]) -> str:
    text = LLAMA
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


_COLUMN, _FULL = "f32[batch, sequence, 1]", "f32[batch, sequence, 8]"
_POW = f"        p: {_FULL} = aten.pow.Tensor_Scalar(x, 2)  # norm\n"
_ADD = f"        a: {_COLUMN} = aten.add.Tensor(m, 0.01)  # norm\n"
_RSQRT = f"        r: {_COLUMN} = aten.rsqrt.default(a)  # norm\n"
_GAIN = f"        y: {_FULL} = aten.mul.Tensor(g, s)  # norm\n"
_MEAN, _PRODUCT, _RETURN = "aten.mean.dim(p, [-1], True)", "aten.mul.Tensor(x, r)", 'return {"z": z}'


def _over(axes: str, shape: str) -> str:
    return _change((_MEAN, f"aten.mean.dim(p, {axes}, True)"), (_COLUMN, shape))


def _scaling(line: str) -> str:
    """The product scales n, which `line` computes."""
    return _change((_PRODUCT, "aten.mul.Tensor(n, r)"), (f"        s: {_FULL}", f"{line}\n        s: {_FULL}"))


NEAR_MISSES = {
    "another axis": (_over("[1]", "f32[batch, 1, 8]"), "m runs over axes [1], not over the last"),
    "two axes": (_over("[-2, -1]", "f32[batch, 1, 1]"), "m runs over axes [-2, -1], not over the last"),
    "no eps": (
        _change((_ADD, ""), ("rsqrt.default(a)", "rsqrt.default(m)")),
        "nothing, no eps, is added to the mean of squares",
    ),
    "statistic read elsewhere": (
        _change((_RETURN, 'return {"z": z, "r": r}')),
        "the statistic r is read by s and output",
    ),
    "mean read elsewhere": (
        _change((_RETURN, 'return {"z": z, "m": m}')),
        "the statistic m is also read by a and output",
    ),
    "squares read elsewhere": (
        _change((_RETURN, 'return {"z": z, "p": p}')),
        "the statistic p is also read by m and output",
    ),
    "another product": (
        _scaling(f"        n: {_FULL} = aten.neg.default(x)"),
        "s scales n, the mean is over the squares of x",
    ),
    "no product": (
        _change((_PRODUCT, "aten.add.Tensor(x, r)")),
        "the statistic r is read by s (aten.add.Tensor), which scales no tensor by it",
    ),
    "root in the numerator": (
        _change(("aten.rsqrt.default(a)", "aten.sqrt.default(a)")),
        "the statistic r is read by s (aten.mul.Tensor), which scales no tensor by it",
    ),
    "root divided": (
        _change(("aten.rsqrt.default(a)", "aten.sqrt.default(a)"), (_PRODUCT, "aten.div.Tensor(r, x)")),
        "the statistic r is read by s (aten.div.Tensor), which scales no tensor by it",
    ),
    "half a layer norm": (
        _scaling(
            f"        u: {_COLUMN} = aten.mean.dim(x, [-1], True)\n        n: {_FULL} = aten.sub.Tensor(x, u)",
        ),
        "s scales n, the mean is over the squares of x",
    ),
    "variance of the uncentred": (
        _change((_POW, ""), (_MEAN, "aten.var.correction(x, [-1], correction=0, keepdim=True)")),
        "s scales x, the variance is that of x",
    ),
    "axis dropped": (
        _change(
            (f"m: {_COLUMN} = {_MEAN}", "m: f32[batch, sequence] = aten.mean.dim(p, [-1])"),
            (f"a: {_COLUMN}", "a: f32[batch, sequence]"),
            (
                _RSQRT,
                "        t: f32[batch, sequence] = aten.rsqrt.default(a)\n"
                f"        r: {_COLUMN} = aten.unsqueeze.default(t, -1)\n",
            ),
        ),
        "m does not keep the axis it reduces",
    ),
    "symbolic width": (
        _change(
            (_GAIN, ""),
            (', *, g: f32[8] = "norm.weight"', ""),
            ("aten.relu.default(y)", "aten.relu.default(s)"),
            (_FULL, "f32[batch, sequence, width]"),
        ),
        "the last axis of x has no fixed size",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str, left_alone: Callable[..., Any]) -> None:
    text, reason = NEAR_MISSES[name]
    assert left_alone(RaiseNorms(), text) == [reason]


@pytest.mark.parametrize(
    "statistic",
    [
        "aten.mean.dim(x, [-1], True)",
        "aten.var.correction(x, [-1], correction=1, keepdim=True)",
        "aten.amax.default(x, [-1], True)",
    ],
)
def test_a_root_of_anything_else_is_not_spoken_of(statistic: str, left_alone: Callable[..., Any]) -> None:
    text = _change((_POW, ""), (_MEAN, statistic))
    assert left_alone(RaiseNorms(), text) == []


def test_a_weight_that_depends_on_the_input_stays_a_product(golden: Callable[..., Any]) -> None:
    """An adaptive gain, or one that varies along another axis, is no part of the operator."""
    golden(
        RaiseNorms(),
        _change(('x: f32[batch, sequence, 8], *, g: f32[8] = "norm.weight"', "x: f32[batch, sequence, 8], g: f32[8]")),
        """\
        def main(x: f32[batch, sequence, 8], g: f32[8]):
            rms_norm: f32[batch, sequence, 8] = aten.rms_norm.default(x, [8], None, 0.01)  # norm
            y: f32[batch, sequence, 8] = aten.mul.Tensor(g, rms_norm)  # norm
            z: f32[batch, sequence, 8] = aten.relu.default(y)
            return {"z": z}""",
    )


@pytest.mark.parametrize("shape", ["[5, 8]", "[1]", "[1, 1, 8]"])
def test_a_weight_that_is_no_vector_of_the_width_stays_a_product(shape: str) -> None:
    text = _change(("g: f32[8]", f"g: f32{shape}")).replace("sequence", "5")
    program = Program.parse(textwrap.dedent(text))
    x = torch.randn(2, 5, 8)
    expected = program(x)
    PassManager([RaiseNorms()]).run(program)
    assert "aten.rms_norm.default(x, [8], None, 0.01)" in str(program)
    torch.testing.assert_close(program(x), expected)


def test_an_eps_that_is_scaled_is_not_understood(left_alone: Callable[..., Any]) -> None:
    assert left_alone(RaiseNorms(), _change(("(m, 0.01)", "(m, 0.01, alpha=2)"))) == []


@pytest.mark.parametrize("name", ["llama", "gemma2", "qwen3"])
def test_finds_every_norm_module(name: str, tiny_decoder: Callable[..., Any]) -> None:
    module, program = tiny_decoder(name)
    norms = {n for n, m in module.named_modules() if type(m).__name__.endswith("RMSNorm")}
    ids = torch.randint(0, 64, (2, 7))
    before = program.run({"input_ids": ids})
    (report,) = PassManager([RaiseNorms()]).run(program)
    raised = program.calls(torch.ops.aten.rms_norm.default)
    assert {program.module_of(node) for node in raised} == norms
    assert len(raised) == len(norms) == len(report.rewritten)
    assert all(program.is_weight(program.arg(node, "weight")) for node in raised)
    assert report.skipped == []
    assert drift(program.run({"input_ids": ids}), before) <= 1e-6
    torch.testing.assert_close(program(ids), module(ids).logits, rtol=1e-4, atol=1e-4)
