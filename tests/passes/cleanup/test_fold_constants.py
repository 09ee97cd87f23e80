"""FoldConstants: golden IR, what it must not touch, and bit-equality."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import torch

from qcompile.ir.program import Program
from qcompile.pass_base import parse_pass
from qcompile.pass_manager import PassManager
from qcompile.passes.cleanup.fold_constants import FoldConstants

MAMBA = """\
    def main(dt: f32[batch, 6], *, a: f32[6] = "mixer.A_log", w: f32[6, 6]):
        e: f32[6] = aten.exp.default(a)  # mixer
        n: f32[6] = aten.neg.default(e)  # mixer
        y: f32[batch, 6] = aten.mul.Tensor(dt, n)  # mixer
        z: f32[batch, 6] = aten.linear.default(y, w)
        return {"z": z}"""


def test_folds_a_chain_at_its_end(golden: Callable[..., Any]) -> None:
    report = golden(
        FoldConstants(),
        MAMBA,
        """\
        def main(dt: f32[batch, 6], *, w: f32[6, 6], mixer_A_log_exp_neg: f32[6] = "mixer.A_log.exp.neg"):
            y: f32[batch, 6] = aten.mul.Tensor(dt, mixer_A_log_exp_neg)  # mixer
            z: f32[batch, 6] = aten.linear.default(y, w)
            return {"z": z}""",
    )
    assert [e.what for e in report.rewritten] == ["now stored as 'mixer.A_log.exp.neg'"]


def test_a_chain_read_twice_is_stored_once_and_equal_chains_share(golden: Callable[..., Any]) -> None:
    golden(
        FoldConstants(),
        """\
        def main(x: f64[2, 6], *, g: f64[6] = "norm.weight"):
            o: f64[6] = aten.add.Tensor(g, 1)
            y: f64[2, 6] = aten.mul.Tensor(x, o)
            o2: f64[6] = aten.add.Tensor(g, 1.0)
            z: f64[2, 6] = aten.mul.Tensor(y, o2)
            u: f64[2, 6] = aten.mul.Tensor(z, o)
            return {"z": u}""",
        """\
        def main(x: f64[2, 6], *, norm_weight_plus_one: f64[6] = "norm.weight.plus_one"):
            y: f64[2, 6] = aten.mul.Tensor(x, norm_weight_plus_one)
            z: f64[2, 6] = aten.mul.Tensor(y, norm_weight_plus_one)
            u: f64[2, 6] = aten.mul.Tensor(z, norm_weight_plus_one)
            return {"z": u}""",
    )


def test_a_name_that_is_taken_gets_a_number() -> None:
    text = MAMBA.replace("w: f32[6, 6]", 'w: f32[6, 6] = "mixer.A_log.exp.neg"')
    program = Program.parse(textwrap.dedent(text))
    PassManager([FoldConstants()]).run(program)
    assert "mixer.A_log.exp.neg_2" in program.weights


def test_two_weights_and_parts_of_tuples(golden: Callable[..., Any]) -> None:
    golden(
        FoldConstants(),
        """\
        def main(x: f32[2, 4], *, a: f32[4], b: f32[4]):
            s: f32[4] = aten.mul.Tensor(a, b)  # mix
            t: tuple[f32[2], f32[2]] = aten.split.Tensor(s, 2)  # mix
            u: f32[2] = operator.getitem(t, 0)  # mix
            v: f32[2] = operator.getitem(t, 1)  # mix
            c: f32[4] = aten.cat.default([v, u])  # mix
            y: f32[2, 4] = aten.mul.Tensor(x, c)
            return {"y": y}""",
        """\
        def main(x: f32[2, 4], *, mix_c: f32[4] = "mix.c"):
            y: f32[2, 4] = aten.mul.Tensor(x, mix_c)
            return {"y": y}""",
    )


def test_literals_that_compute_fold(golden: Callable[..., Any]) -> None:
    golden(
        FoldConstants(),
        """\
        def main(x: f32[4, 4]):
            o: f32[4, 4] = aten.ones.default([4, 4])  # mask
            t: f32[4, 4] = aten.tril.default(o)  # mask
            y: f32[4, 4] = aten.mul.Tensor(x, t)
            return {"y": y}""",
        """\
        def main(x: f32[4, 4], *, mask_t: f32[4, 4] = "mask.t"):
            y: f32[4, 4] = aten.mul.Tensor(x, mask_t)
            return {"y": y}""",
    )


def test_leaves_moves_casts_factories_random_numbers_and_quantization(left_alone: Callable[..., Any]) -> None:
    text = """\
        def main(x: f32[2, 4], *, w: f32[4, 4], r: bf16[4, 4]):
            t: f32[4, 4] = aten.transpose.int(w, 0, 1)
            m: f32[2, 4] = aten.mm.default(x, t)
            c: f32[4, 4] = aten.to.dtype(r, torch.float32)
            l: f32[2, 4] = aten.linear.default(m, c)
            inf: f32[()] = aten.full.default([], float("-inf"))
            k: f32[2, 4] = aten.maximum.default(l, inf)
            n: f32[4] = aten.rand.default([4])
            a: f32[4] = aten.neg.default(n)
            j: f32[2, 4] = aten.mul.Tensor(k, a)
            p: tuple[f32[4, 1], f32[0]] = qcompile.choose_qparams.default(w, "int4 sym channel")
            s: f32[4, 1] = operator.getitem(p, 0)
            q: i8[4, 4] = qcompile.quantize.default(w, s, None, "int4 sym channel")
            d: f32[4, 4] = qcompile.dequantize.default(q, s, None, "int4 sym channel")
            y: f32[2, 4] = aten.linear.default(j, d)
            return {"y": y}"""
    assert left_alone(FoldConstants(), text) == []


def test_says_why_a_large_one_stays(left_alone: Callable[..., Any]) -> None:
    reason = "it is, or is made from, more than max_elements=5 elements"
    assert left_alone(FoldConstants(max_elements=5), MAMBA) == [reason]


def test_says_why_a_returned_one_stays(left_alone: Callable[..., Any]) -> None:
    text = MAMBA.replace('return {"z": z}', 'return {"z": z, "n": n}')
    assert left_alone(FoldConstants(), text) == ["it is returned, and a returned value stays a call"]


def test_bits_are_the_programs_own() -> None:
    text = textwrap.dedent(MAMBA).replace("f32", "bf16")
    program = Program.parse(text)
    expected = program.weights["mixer.A_log"].exp().neg()
    PassManager([parse_pass("fold-constants(max_elements=100)")]).run(program)
    stored = program.weights["mixer.A_log.exp.neg"]
    assert stored.dtype == torch.bfloat16
    assert torch.equal(stored, expected)
