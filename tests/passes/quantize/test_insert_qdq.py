"""Where quantize and dequantize go, what they share, what they leave alone, and what the program then computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.recipe import Rule

Feeds = Callable[..., dict[str, torch.Tensor]]
Decoder = Callable[..., tuple[torch.nn.Module, Program]]


def insert(program: Program, **options: Any) -> Report:
    (report,) = PassManager([InsertQDQ(**options)]).run(program)
    return report


def test_weight_symmetric_and_asymmetric() -> None:
    program = Program.parse(
        """def main(x: f32[n, 8], *, w: f32[4, 8], v: f32[2, 4]):
    y = aten.linear.default(x, w)  # a.up
    z = aten.linear.default(y, v)  # a.dn
    return {"z": z}"""
    )
    report = insert(program, weights="int4 sym group=4", rules=(Rule(match="a.dn", weights="uint8 asym tensor"),))
    expected = """\
def main(x: f32[n, 8], *, w: f32[4, 8], v: f32[2, 4]):
    qparams: tuple[f32[4, 2]] = qcompile.choose_qparams.default(w, "int4 sym group=4")  # a.up
    scale: f32[4, 2] = operator.getitem(qparams, 0)  # a.up
    quantize: i8[4, 8] = qcompile.quantize.default(w, scale, None, "int4 sym group=4")  # a.up
    dequantize: f32[4, 8] = qcompile.dequantize.default(quantize, scale, None, "int4 sym group=4")  # a.up
    y: f32[n, 4] = aten.linear.default(x, dequantize)  # a.up
    qparams_1: tuple[f32[1, 1], u8[1, 1]] = qcompile.choose_qparams.default(v, "uint8 asym tensor")  # a.dn
    scale_1: f32[1, 1] = operator.getitem(qparams_1, 0)  # a.dn
    zero_point: u8[1, 1] = operator.getitem(qparams_1, 1)  # a.dn
    quantize_1: u8[2, 4] = qcompile.quantize.default(v, scale_1, zero_point, "uint8 asym tensor")  # a.dn
    dequantize_1: f32[2, 4] = qcompile.dequantize.default(quantize_1, scale_1, zero_point, "uint8 asym tensor")  # a.dn
    z: f32[n, 2] = aten.linear.default(y, dequantize_1)  # a.dn
    return {"z": z}"""
    assert str(program) == expected
    assert [(e.where, e.what) for e in report.rewritten] == [
        ("a.up", "w: int4 sym group=4 (default)"),
        ("a.dn", "v: uint8 asym tensor (rules.0)"),
    ]


def test_readers_of_one_activation_share_its_quantization() -> None:
    program = Program.parse(
        """def main(x: f32[n, 8], *, q: f32[4, 8], k: f32[4, 8], v: f32[4, 8]):
    a = aten.linear.default(x, q)  # q
    b = aten.linear.default(x, k)  # k
    c = aten.linear.default(x, v)  # v
    return {"a": a, "b": b, "c": c, "x": x}"""
    )
    insert(
        program,
        activations="int8 sym token dynamic",
        rules=(Rule(match="v", activations="int8 sym tensor dynamic"),),
    )
    expected = """\
def main(x: f32[n, 8], *, q: f32[4, 8], k: f32[4, 8], v: f32[4, 8]):
    qparams: tuple[f32[n, 1]] = qcompile.choose_qparams.default(x, "int8 sym token dynamic")  # q
    scale: f32[n, 1] = operator.getitem(qparams, 0)  # q
    quantize: i8[n, 8] = qcompile.quantize.default(x, scale, None, "int8 sym token dynamic")  # q
    dequantize: f32[n, 8] = qcompile.dequantize.default(quantize, scale, None, "int8 sym token dynamic")  # q
    a: f32[n, 4] = aten.linear.default(dequantize, q)  # q
    b: f32[n, 4] = aten.linear.default(dequantize, k)  # k
    qparams_1: tuple[f32[1, 1]] = qcompile.choose_qparams.default(x, "int8 sym tensor dynamic")  # v
    scale_1: f32[1, 1] = operator.getitem(qparams_1, 0)  # v
    quantize_1: i8[n, 8] = qcompile.quantize.default(x, scale_1, None, "int8 sym tensor dynamic")  # v
    dequantize_1: f32[n, 8] = qcompile.dequantize.default(quantize_1, scale_1, None, "int8 sym tensor dynamic")  # v
    c: f32[n, 4] = aten.linear.default(dequantize_1, v)  # v
    return {"a": a, "b": b, "c": c, "x": x}"""
    assert str(program) == expected


LAYOUTS = {
    "linear": ("y = aten.linear.default(x, w)", "f32[6, 4]", "group=2", (6, 2)),
    "Conv1D": (
        "r = aten.view.default(x, [15, 4])\n    b = aten.sum.default(x)\n    y = aten.addmm.default(b, r, w)",
        "f32[4, 6]",
        "group=2 axis=0",
        (2, 6),
    ),
    "experts": ("y = aten.bmm.default(x, w)", "f32[3, 4, 6]", "group=2 axis=1", (3, 2, 6)),
    "gathered experts": (
        "g = aten.index.Tensor(w, [i])\n    r = aten.reshape.default(x, [15, 4])\n"
        "    u = aten.unsqueeze.default(r, -1)\n    y = aten.bmm.default(g, u)",
        "f32[2, 6, 4]",
        "group=2",
        (2, 6, 2),
    ),
    "transposed": ("t = aten.numpy_T.default(w)\n    y = aten.matmul.default(x, t)", "f32[6, 4]", "group=2", (6, 2)),
}


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("element", ["int4 sym", "uint4 asym"])
def test_the_program_computes_with_the_rounded_weight(name: str, element: str, feeds: Feeds) -> None:
    """Whatever the layout, groups run along the summed axis and the result is that of dequantize(quantize(W))."""
    body, kind, granularity, scales = LAYOUTS[name]
    text = f"def main(x: f32[3, 5, 4], i: i64[15], *, w: {kind}):\n    {body}\n    return {{'y': y}}"
    program, reference = Program.parse(text), Program.parse(text)
    inputs = feeds(program)
    insert(program, weights=f"{element} group=2")
    (params,) = program.calls(torch.ops.qcompile.choose_qparams.default)
    assert program.arg(params, "spec") == f"{element} {granularity}"
    assert tuple(params.meta["val"][0].shape) == scales
    spec = QuantSpec.parse(f"{element} {granularity}")
    reference.weights["w"] = spec.quantize(reference.weights["w"]).dequantize(torch.float32)
    assert torch.equal(program.run(inputs)["y"], reference.run(inputs)["y"])


def test_values_keep_their_dtype(feeds: Feeds) -> None:
    text = """def main(x: bf16[n, 8], *, w: bf16[4, 8]):
    y = aten.linear.default(x, w)
    return {"y": y}"""
    program = Program.parse(text)
    insert(program, weights="int4 sym group=4", activations="int8 sym token dynamic")
    dequantized = program.calls(torch.ops.qcompile.dequantize.default)
    assert [node.meta["val"].dtype for node in dequantized] == [torch.bfloat16] * 2
    assert program.run(feeds(program))["y"].dtype == torch.bfloat16
    half_scales = Program.parse(text)
    insert(half_scales, weights="int4 sym group=4 scale=bf16")
    assert "dtype=" not in str(half_scales)


TIED = """def main(ids: i64[batch, sequence], *, e: f32[16, 8], w: f32[8, 8]):
    x = aten.embedding.default(e, ids)  # embed
    y = aten.linear.default(x, w)  # middle
    z = aten.linear.default(y, e)  # head
    return {"logits": z}"""


def test_a_float_head_leaves_a_tied_embedding_alone() -> None:
    program = Program.parse(TIED)
    report = insert(program, weights="int4 sym channel")
    (head,) = [n for n in program.nodes if n.name == "z"]
    assert program.arg(head, "weight").name == "e"
    assert [(e.where, e.what) for e in report.skipped] == [
        ("embed", "stays float (embeddings: null)"),
        ("head", "stays float (head: null)"),
    ]
    assert report.notes == []


def test_a_quantized_head_leaves_the_embedding_float_and_says_so() -> None:
    program = Program.parse(TIED)
    report = insert(program, head="int8 sym channel")
    by_name = {n.name: n for n in program.nodes}
    assert program.arg(by_name["x"], "weight").name == "e"
    assert program.arg(by_name["z"], "weight").name == "dequantize"
    assert report.notes == ["e stays float as well, for embed: 0.00 MB beside its codes"]


SHARED = """def main(x: f32[n, 8], *, w: f32[8, 8]):
    t = aten.t.default(w)  # first
    a = aten.mm.default(x, t)  # first
    b = aten.mm.default(a, t)  # second
    return {"b": b}"""


def test_readers_that_agree_share_one_quantized_weight() -> None:
    program = Program.parse(SHARED)
    insert(program, weights="int8 sym channel")
    assert len(program.calls(torch.ops.qcompile.quantize.default)) == 1
    assert [n.name for n in program.nodes][-3:] == ["t", "a", "b"]


@pytest.mark.parametrize("other", [None, "int4 sym channel"])
def test_readers_that_disagree_do_not_disturb_each_other(other: str | None, feeds: Feeds) -> None:
    """The transpose that both read is copied for the one whose weight is quantized."""
    program, reference = Program.parse(SHARED), Program.parse(SHARED)
    inputs = feeds(program)
    report = insert(program, weights="int8 sym channel", rules=(Rule(match="second", weights=other),))
    w = reference.weights["w"]
    first = QuantSpec.parse("int8 sym channel").quantize(w).dequantize()
    second = w if other is None else QuantSpec.parse(other).quantize(w).dequantize()
    assert torch.equal(program.run(inputs)["b"], inputs["x"] @ first.t() @ second.t())
    expected = "w stays float as well, for second" if other is None else "w is stored 2 times"
    assert report.notes[0].startswith(expected)


def test_inserting_twice_changes_nothing() -> None:
    program = Program.parse(TIED)
    options = {"weights": "int4 sym channel", "activations": "int8 sym token dynamic"}
    insert(program, **options)
    before = str(program)
    report = insert(program, **options)
    assert str(program) == before
    assert [(e.where, e.what) for e in report.skipped] == [
        ("embed", "stays float (embeddings: null)"),
        ("middle", "stays float (quantized already: int4 sym channel)"),
        ("head", "stays float (head: null)"),
    ]


def test_an_input_quantized_already_is_left_alone() -> None:
    program = Program.parse(TIED)
    insert(program, activations="int8 sym token dynamic")
    before = str(program)
    report = insert(program, activations="int8 sym tensor dynamic")
    assert str(program) == before
    assert ("middle", "its input is quantized already: int8 sym token dynamic") in [
        (e.where, e.what) for e in report.skipped
    ]


def test_obstacles_are_reported() -> None:
    program = Program.parse(
        "def main(x: f32[2, 4], *, w: f32[6, 4]):\n    m = aten.mul.Tensor(w, 2.0)\n"
        "    y = aten.linear.default(x, m)  # a\n    return {'y': y}"
    )
    report = insert(program, weights="int4 sym channel")
    assert [(e.where, e.what) for e in report.skipped] == [
        ("a (y)", "its weight is computed (mul, m) before it is multiplied")
    ]


def test_text_of_the_result_parses_back() -> None:
    program = Program.parse(TIED)
    insert(program, weights="int4 asym group=4", activations="int8 asym token dynamic", head="int8 sym channel")
    assert str(Program.parse(str(program))) == str(program)


def test_a_whole_decoder(tiny_decoder: Decoder) -> None:
    """The program equals the module whose linear weights were replaced by their rounded values."""
    import copy

    module, program = tiny_decoder("llama", layers=2)
    report = insert(program, weights="int4 sym group=16")
    assert len(report.rewritten) == 14
    rounded = copy.deepcopy(module)
    spec = QuantSpec.parse("int4 sym group=16")
    for name, layer in rounded.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lm_head" not in name:
            layer.weight.data = spec.quantize(layer.weight.data).dequantize()
    ids = torch.arange(14).view(2, 7)
    with torch.no_grad():
        expected = rounded(input_ids=ids, use_cache=False).logits
    assert torch.allclose(program(ids), expected, atol=1e-5)
