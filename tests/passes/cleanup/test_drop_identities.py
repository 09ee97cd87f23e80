"""DropIdentities: each kind of identity, its near miss, memory layouts, and speed."""

from __future__ import annotations

import textwrap
import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.ir.program import Program
from qcompile.pass_manager import PassManager
from qcompile.passes.cleanup.dead_code import DeadCode
from qcompile.passes.cleanup.drop_identities import DropIdentities
from qcompile.passes.cleanup.fold_constants import FoldConstants
from qcompile.passes.norm.raise_norms import RaiseNorms

# name → (lines from x: f32[b, 4, 6] to y, why the report says y goes)
IDENTITIES = {
    "slice": (["aten.slice.Tensor(x, 1, 0, 9223372036854775807)"], "a slice of everything"),
    "slice to the size": (["aten.slice.Tensor(x, 2, None, 6)"], "a slice of everything"),
    "view": (["aten.view.default(x, [-1, 4, 6])"], "the shape it has already"),
    "views": (
        ["aten.view.default(x, [-1, 24])", "aten.view.default(v0, [-1, 2, 12])", "aten.view.default(v1, [-1, 4, 6])"],
        "the shape it has already",
    ),
    "expand": (["aten.expand.default(x, [-1, 4, 6])"], "the shape it has already"),
    "repeat": (["aten.repeat.default(x, [1, 1, 1])"], "the shape it has already"),
    "transposes": (["aten.transpose.int(x, 1, 2)", "aten.transpose.int(v0, -1, -2)"], "undoes v0"),
    "transpose of one axis": (["aten.transpose.int(x, 1, 1)"], "axes in the order they have"),
    "permutes": (["aten.permute.default(x, [2, 0, 1])", "aten.permute.default(v0, [1, 2, 0])"], "undoes v0"),
    "permute and transpose": (["aten.permute.default(x, [0, 2, 1])", "aten.transpose.int(v0, 1, 2)"], "undoes v0"),
    "unsqueeze": (["aten.unsqueeze.default(x, 1)", "aten.squeeze.dim(v0, 1)"], "undoes v0"),
    "add": (["aten.add.Tensor(x, 0)"], "aten.add.Tensor with 0"),
    "sub": (["aten.sub.Tensor(x, 0.0)"], "aten.sub.Tensor with 0.0"),
    "mul": (["aten.mul.Tensor(x, 1.0)"], "aten.mul.Tensor with 1.0"),
    "div": (["aten.div.Tensor(x, 1)"], "aten.div.Tensor with 1"),
    "casts": (["aten.to.dtype(x, torch.float64)", "aten.to.dtype(v0, torch.float32)"], "undoes v0, which lost nothing"),
    "dropout": (["aten.dropout.default(x, 0.1, False)"], "dropout that drops nothing"),
    "clone": (["aten.clone.default(x)"], "a copy of its operand"),
    "contiguous": (["aten.contiguous.default(x)"], "a copy of its operand"),
    "cat": (["aten.cat.default([x], 1)"], "a concatenation of one"),
}

NEAR_MISSES = {
    "slice of a part": ["aten.slice.Tensor(x, 1, 1, 9223372036854775807)"],
    "view to another shape": ["aten.view.default(x, [-1, 6, 4])"],
    "views with a transpose between": ["aten.transpose.int(x, 1, 2)", "aten.reshape.default(v0, [-1, 4, 6])"],
    "repeat": ["aten.repeat.default(x, [1, 1, 2])"],
    "permutes that don't cancel": ["aten.permute.default(x, [2, 0, 1])", "aten.permute.default(v0, [2, 0, 1])"],
    "squeeze of another axis": ["aten.unsqueeze.default(x, 1)", "aten.squeeze.dim(v0, 2)"],
    "add 1": ["aten.add.Tensor(x, 1)"],
    "mul 0": ["aten.mul.Tensor(x, 0)"],
    "casts that lose": ["aten.to.dtype(x, torch.bfloat16)", "aten.to.dtype(v0, torch.float32)"],
    "casts through integers": ["aten.to.dtype(x, torch.int64)", "aten.to.dtype(v0, torch.float32)"],
    "cat of two": ["aten.cat.default([x, x], 1)"],
    "dropout in training": ["aten.dropout.default(x, 0.1, True)"],
}


def _program(lines: list[str]) -> Program:
    names = [*(f"v{i}" for i in range(len(lines) - 1)), "y"]
    body = [f"    {name} = {line}" for name, line in zip(names, lines, strict=True)]
    head, tail = (
        "def main(x0: f32[b, 4, 6]):\n    x = aten.abs.default(x0)",
        '    z = aten.neg.default(y)\n    return {"z": z}',
    )
    return Program.parse("\n".join([head, *body, tail]))


@pytest.mark.parametrize("name", IDENTITIES)
def test_identity(name: str) -> None:
    lines, why = IDENTITIES[name]
    program = _program(lines)
    x = torch.randn(3, 4, 6)
    expected = program(x)
    (report,) = PassManager([DropIdentities()]).run(program)
    assert [(e.where, e.what) for e in report.rewritten] == [("y", why)]
    assert [n.name for n in program.nodes] == ["x", "z"]
    assert torch.equal(program(x), expected)


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    program = _program(NEAR_MISSES[name])
    before = str(program)
    (report,) = PassManager([DropIdentities()]).run(program)
    assert (str(program), report.rewritten) == (before, [])


def test_an_integer_divided_by_one_becomes_a_float(left_alone: Callable[..., Any]) -> None:
    text = """\
        def main(x: i64[4]):
            y: f32[4] = aten.div.Tensor(x, 1)
            return {"y": y}"""
    assert left_alone(DropIdentities(), text) == []


def test_a_dropped_copy_leaves_views_that_still_work(golden: Callable[..., Any]) -> None:
    golden(
        DropIdentities(),
        """\
        def main(x: f32[b, 4, 6]):
            t: f32[b, 6, 4] = aten.transpose.int(x, 1, 2)
            c: f32[b, 6, 4] = aten.contiguous.default(t)
            u: f32[b, 1, 6, 4] = aten.unsqueeze.default(c, 1)
            v: f32[b, 24] = aten.view.default(u, [-1, 24])
            return {"v": v}""",
        """\
        def main(x: f32[b, 4, 6]):
            t: f32[b, 6, 4] = aten.transpose.int(x, 1, 2)
            u: f32[b, 1, 6, 4] = aten.unsqueeze.default(t, 1)
            v: f32[b, 24] = aten.reshape.default(u, [-1, 24])
            return {"v": v}""",
    )


def test_layouts_show_through_elementwise_operators_but_not_through_products(golden: Callable[..., Any]) -> None:
    golden(
        DropIdentities(),
        """\
        def main(x: f32[3, 4, 6], *, w: f32[4, 4]):
            t: f32[3, 6, 4] = aten.transpose.int(x, 1, 2)
            c: f32[3, 6, 4] = aten.contiguous.default(t)
            m: f32[3, 6, 4] = aten.mul.Tensor(c, c)
            v: f32[3, 24] = aten.view.default(m, [3, 24])
            l: f32[3, 6, 4] = aten.linear.default(m, w)
            u: f32[3, 24] = aten.view.default(l, [3, 24])
            return {"v": v, "u": u}""",
        """\
        def main(x: f32[3, 4, 6], *, w: f32[4, 4]):
            t: f32[3, 6, 4] = aten.transpose.int(x, 1, 2)
            m: f32[3, 6, 4] = aten.mul.Tensor(t, t)
            v: f32[3, 24] = aten.reshape.default(m, [3, 24])
            l: f32[3, 6, 4] = aten.linear.default(m, w)
            u: f32[3, 24] = aten.view.default(l, [3, 24])
            return {"v": v, "u": u}""",
    )


@pytest.mark.parametrize("view", ["view", "_unsafe_view"])
def test_a_dropped_copy_of_an_expanded_tensor(view: str) -> None:
    program = Program.parse(f"""\
def main(x: f32[b, 1, 3, 4]):
    e: f32[b, 2, 3, 4] = aten.expand.default(x, [-1, 2, -1, -1])
    c: f32[b, 2, 3, 4] = aten.clone.default(e, memory_format=torch.contiguous_format)
    v: f32[b, 6, 4] = aten.{view}.default(c, [-1, 6, 4])
    return {{"v": v}}""")
    x = torch.randn(2, 1, 3, 4)
    expected = program(x)
    PassManager([DropIdentities()]).run(program)
    assert [str(n.target) for n in program.nodes] == ["aten.expand.default", "aten.reshape.default"]
    assert torch.equal(program(x), expected)


@pytest.mark.parametrize("reader", ["aten.view_as_complex.default(s)", "aten.view.dtype(s, torch.int32)"])
def test_a_copy_stays_where_bits_are_viewed(reader: str, left_alone: Callable[..., Any]) -> None:
    text = f"""\
        def main(x: f32[2, 4]):
            t: f32[4, 2] = aten.transpose.int(x, 0, 1)
            c: f32[4, 2] = aten.contiguous.default(t)
            s: f32[2, 2] = aten.slice.Tensor(c, 0, 0, 2)
            y = {reader}
            r = aten.abs.default(y)
            return {{"r": r}}"""
    before = str(Program.parse(textwrap.dedent(text)))
    assert left_alone(DropIdentities(), before) == [
        "a copy of its operand, but y needs the memory layout that it makes"
    ]


def test_pythons_operators_take_any_layout(golden: Callable[..., Any]) -> None:
    golden(
        DropIdentities(),
        """\
        def main(x: i64[4, n]):
            a: i64[4, n] = aten.add.Tensor(x, 0)
            y: i64[4, n] = aten.__and__.Tensor(a, x)
            return {"y": y}""",
        """\
        def main(x: i64[4, n]):
            y: i64[4, n] = aten.__and__.Tensor(x, x)
            return {"y": y}""",
    )


def test_an_input_is_not_returned_bare(left_alone: Callable[..., Any]) -> None:
    text = """\
        def main(x: f32[2, 4]):
            y: f32[2, 4] = aten.clone.default(x)
            return {"y": y}"""
    assert left_alone(DropIdentities(), text) == ["a copy of its operand, but it is what returns x"]


STEPS = [
    "aten.transpose.int({0}, 1, 2)",
    "aten.transpose.int({0}, 0, 2)",
    "aten.contiguous.default({0})",
    "aten.clone.default({0})",
    "aten.slice.Tensor({0}, 1, 0, 99)",
    "aten.slice.Tensor({0}, 2, 1, 99)",
    "aten.reshape.default({0}, [2, -1, 2])",
    "aten.mul.Tensor({0}, 1)",
    "aten.add.Tensor({0}, 0)",
    "aten.to.dtype({0}, torch.float64)",
    "aten.to.dtype({0}, torch.float32)",
    "aten.to.dtype({0}, torch.bfloat16)",
    "aten.neg.default({0})",
    "aten.dropout.default({0}, 0.5, False)",
]


@settings(max_examples=60)
@given(st.lists(st.sampled_from(STEPS), min_size=1, max_size=9), st.booleans())
def test_random_chains_keep_their_bits(steps: list[str], look: bool) -> None:
    lines, last = [], "x"
    for index, step in enumerate(steps):
        lines.append(f"    v{index} = {step.format(last)}")
        last = f"v{index}"
        if look and "contiguous" in step:  # what follows a copy, or what is computed from it, may be viewed
            lines.append(f"    e{index} = aten.neg.default({last})\n    w{index} = aten.view.default(e{index}, [-1])")
    reads = "".join(f', "w{i}": w{i}' for i, s in enumerate(steps) if look and "contiguous" in s)
    end = f'    z = aten.abs.default({last})\n    return {{"z": z{reads}}}'
    program = Program.parse("\n".join(["def main(x: f32[4, 4, 4]):", *lines, end]))
    x = {"x": torch.randn(4, 4, 4)}
    expected = program.run(x)
    PassManager([DropIdentities(), DropIdentities()]).run(program)
    for name, value in program.run(x).items():
        assert torch.equal(value, expected[name])
        assert value.dtype == expected[name].dtype
    program.verify()


def test_a_large_graph_takes_less_than_a_second() -> None:
    lines, last = [], "x"
    for i in range(130):  # as many norms as the largest models have
        lines += [
            f"    p{i} = aten.pow.Tensor_Scalar({last}, 2)",
            f"    m{i} = aten.mean.dim(p{i}, [-1], True)",
            f"    a{i} = aten.add.Tensor(m{i}, 0.1)",
            f"    r{i} = aten.rsqrt.default(a{i})",
            f"    s{i} = aten.mul.Tensor({last}, r{i})",
            f"    o{i} = aten.add.Tensor(w{i}, 1)",
            f"    y{i} = aten.mul.Tensor(s{i}, o{i})",
        ]
        last = f"y{i}"
        for j in range(12):
            lines.append(f"    t{i}_{j} = aten.view.default({last}, {[2, 8] if j % 2 else [8, 2]})")
            last = f"t{i}_{j}"
    weights = ", ".join(f"w{i}: f32[8]" for i in range(130))
    text = "\n".join([f"def main(x: f32[2, 8], *, {weights}):", *lines, f'    return {{"y": {last}}}'])
    parsed = Program.parse(text)
    assert len(parsed.nodes) == 2470
    for pass_ in (DeadCode(), DropIdentities(), FoldConstants(), RaiseNorms()):
        program = parsed.clone()
        start = time.process_time()
        report = pass_.run(program)
        assert time.process_time() - start < 1, pass_
        assert len(report.rewritten) == {"dead-code": 0, "drop-identities": 780}.get(pass_.name, 130)
