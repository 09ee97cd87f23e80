"""What becomes an operator, what is merged and fused, and what stays in torch with a reason: on small programs."""

from __future__ import annotations

import pytest
import torch

import qcompile
from qcompile.backends.triton.backend import TritonBackend
from qcompile.backends.triton.rewrite import Rewritten, rewrite
from qcompile.drift import drift
from qcompile.ir.program import Program

BLOCK = """\
def main(x: f32[batch, sequence, 64], *, g: f32[64], q: f32[64, 64], k: f32[32, 64], v: f32[32, 64], o: f32[64, 64],
         b: f32[64]):
    n = aten.rms_norm.default(x, [64], g, 1e-05)
    a = aten.linear.default(n, q)
    c = aten.linear.default(n, k)
    d = aten.linear.default(n, v)
    e = aten.cat.default([c, d], -1)
    f = aten.add.Tensor(a, e)
    y = aten.linear.default(f, o, b)
    return {"y": y}"""

LINEAR = """\
def main(x: f32[batch, {k}], *, w: f32[{n}, {k}]):
    y = aten.linear.default(x, w)
    return {{"y": y}}"""


def lowered(text: str, passes: str, merged: bool = True) -> tuple[Program, Rewritten]:
    program = Program.parse(text)
    qcompile.run_passes(program, passes)
    return program, rewrite(program, merged)


def calls(rewritten: Rewritten) -> list[str]:
    names = [str(node.target) for node in rewritten.program.nodes]
    return [name.split(".")[1] for name in names if name.startswith("qcompile_triton")]


def agree(program: Program, rewritten: Rewritten, shape: tuple[int, ...]) -> float:
    feeds = {"x": torch.randn(shape, generator=torch.Generator().manual_seed(0))}
    return drift(rewritten.program.run(feeds), program.run(feeds))


def test_products_that_read_one_value_become_one() -> None:
    program, made = lowered(BLOCK, "insert-qdq(weights=int4 group=32), rtn")
    assert calls(made) == ["weight_only", "weight_only"]
    assert [w.name for w in made.packed] == ["q", "k", "v", "o"]
    assert [(w.start, w.stop) for w in made.packed] == [(0, 64), (64, 96), (96, 128), (0, 64)]
    assert agree(program, made, (2, 3, 64)) == 0
    _, apart = lowered(BLOCK, "insert-qdq(weights=int4 group=32), rtn", merged=False)
    assert calls(apart) == ["weight_only"] * 4


def test_products_of_other_formats_stay_apart() -> None:
    recipe = {
        "weights": "int4 group=32",
        "passes": ["raise-norms"],
        "rules": [{"match": "k", "weights": "int8 group=32"}],
    }
    model = qcompile.compile(Program.parse(BLOCK), recipe)
    made = rewrite(model.program)
    assert [(w.name, w.start, w.columns) for w in made.packed] == [
        ("q", 0, 96),
        ("v", 64, 96),
        ("k", 0, 32),
        ("o", 0, 64),
    ]
    assert agree(model.program, made, (2, 3, 64)) == 0


@pytest.mark.parametrize("activations", ["null", "int8 sym token dynamic"])
def test_a_product_that_reads_a_product(activations: str) -> None:
    text = """\
def main(x: f32[batch, 64], *, w: f32[48, 64], u: f32[32, 48]):
    y = aten.linear.default(x, w)
    z = aten.linear.default(y, u)
    return {"y": z}"""
    program, made = lowered(text, f"insert-qdq(weights=int4 group=16, activations={activations}), rtn")
    assert calls(made).count("weight_only") == 2
    assert agree(program, made, (3, 64)) < 1e-6


def test_the_graph_parses_back() -> None:
    _, made = lowered(BLOCK, "insert-qdq(weights=int4 group=32), rtn")
    text = str(made.program)
    assert str(Program.parse(text, made.program.weights)) == text


def test_int8_activations_take_the_norm_with_them() -> None:
    spec = "insert-qdq(weights=int8 channel, activations=int8 sym token dynamic), rtn"
    program, made = lowered(BLOCK, spec)
    assert calls(made) == ["quantize_rows", "quantized_linear", "quantize_rows", "quantized_linear"]
    assert not any(str(node.target).startswith("aten.rms_norm") for node in made.program.nodes)
    assert "1 norms in kernels" in made.notes
    assert agree(program, made, (2, 3, 64)) < 1e-6


@pytest.mark.parametrize(
    ("weights", "activations", "kernel"),
    [
        ("int4 group=32", "int8 sym token dynamic", "quantized_linear"),
        ("e4m3fn channel", "e4m3fn token dynamic", "quantized_linear"),
        ("e4m3fn block=32x32", "e4m3fn group=32 dynamic", "quantized_linear"),
        ("mxfp4", "mxfp4 dynamic", "scaled_linear"),
        ("mxfp8_e4m3", "mxfp8_e4m3 dynamic", "scaled_linear"),
        ("int8 asym channel", "int8 sym token dynamic", "weight_only"),
        ("int8 channel", "int8 asym token dynamic", "weight_only"),
        ("mxfp4", "mxfp4(even) dynamic", "weight_only"),
        ("nvfp4", "nvfp4 dynamic", "weight_only"),
        ("int8 channel", "e4m3fn token dynamic", "weight_only"),
    ],
)
def test_the_kernel_for_an_activation(weights: str, activations: str, kernel: str) -> None:
    text = LINEAR.format(n=96, k=64)
    program, made = lowered(text, f"insert-qdq(weights={weights}, activations={activations}), rtn")
    assert kernel in calls(made)
    assert any("simulated" in note for note in made.notes) == (kernel == "weight_only")
    assert agree(program, made, (3, 64)) < 1e-6


def test_a_row_that_no_run_divides_is_padded() -> None:
    program, made = lowered(LINEAR.format(n=40, k=44), "insert-qdq(weights=int4 channel), rtn")
    assert agree(program, made, (3, 44)) < 1e-6
    (plane,) = made.packed[0].planes
    assert made.program.weights[plane].shape == (64 * 4 // 32, 40)


def test_weights_that_lie_the_other_way() -> None:
    text = """\
def main(x: f32[batch, 64], *, w: f32[64, 48], b: f32[48]):
    y = aten.addmm.default(b, x, w)
    return {"y": y}"""
    program, made = lowered(text, "insert-qdq(weights=int4 group=32), rtn")
    assert calls(made) == ["weight_only"]
    assert made.packed[0].transposed
    assert agree(program, made, (3, 64)) < 1e-6


@pytest.mark.parametrize("weights", ["int4 group=32 double=8x64", "int4 group=32 via=e4m3fn"])
def test_what_no_kernel_reads_stays_in_torch_and_says_so(weights: str) -> None:
    program, made = lowered(LINEAR.format(n=96, k=64), f"insert-qdq(weights={weights}), rtn")
    assert calls(made) == []
    assert any("run in torch" in note for note in made.notes)
    assert agree(program, made, (3, 64)) == 0


@pytest.mark.parametrize("transforms", [64, 32])
def test_online_transforms_become_kernels(transforms: int) -> None:
    text = LINEAR.format(n=96, k=64).replace(
        "    y = aten.linear.default(x, w)",
        f"    h = qcompile.hadamard.default(x, 1, {transforms})\n    y = aten.linear.default(h, w)",
    )
    program, made = lowered(text, "insert-qdq(weights=int8 channel, activations=int8 sym token dynamic), rtn")
    fused = ["hadamard_quantize", "quantized_linear"]
    assert calls(made) == (fused if transforms == 64 else ["hadamard", "quantize_rows", "quantized_linear"])
    assert agree(program, made, (3, 64)) < 1e-6


EXPERTS = """\
def main(x: f32[tokens, 64], expert: i64[tokens], *, w: f32[3, 48, 64]):
    picked = aten.index.Tensor(w, [expert])
    column = aten.unsqueeze.default(x, -1)
    product = aten.bmm.default(picked, column)
    y = aten.squeeze.dim(product, -1)
    return {"y": y}"""


@pytest.mark.parametrize("weights", ["int4 group=32", "int4 asym group=32", "nvfp4"])
def test_gathered_experts_become_one_product(weights: str) -> None:
    program, made = lowered(EXPERTS, f"insert-qdq(weights={weights}), rtn")
    assert calls(made) == ["expert_linear"]
    assert made.packed[0].stacked == 3
    feeds = {"x": torch.randn(5, 64), "expert": torch.tensor([2, 0, 2, 1, 2])}
    assert drift(made.program.run(feeds), program.run(feeds)) < 1e-6


ATTENTION = """\
def main(q: f32[batch, 4, sequence, 16], k: i8[batch, 2, past, 16], ks: f32[batch, 2, past, 1],
         v: i8[batch, 2, past, 16], vs: f32[batch, 2, past, 1], mask: {mask}[batch, 1, sequence, past]):
    size = aten.sym_size.int(k, 0)
    tokens = aten.sym_size.int(k, 2)
    kd = qcompile.dequantize.default(k, ks, None, "int8 sym token dynamic")
    vd = qcompile.dequantize.default(v, vs, None, "int8 sym token dynamic")
    k1 = aten.unsqueeze.default(kd, {axis})
    k2 = aten.expand.default(k1, {shape})
    k3 = aten.reshape.default(k2, [size, 4, tokens, 16])
    v1 = aten.repeat_interleave.self_int(vd, 2, 1)
    y = aten.scaled_dot_product_attention.default(q, k3, v1, mask)
    return {{"y": y}}"""


def attention_feeds() -> dict[str, torch.Tensor]:
    codes = torch.randint(-128, 128, (2, 2, 2, 5, 16), generator=torch.Generator().manual_seed(0)).to(torch.int8)
    scales = torch.rand(2, 2, 2, 5, 1, generator=torch.Generator().manual_seed(1)) / 50
    mask = torch.ones(2, 1, 3, 5, dtype=torch.bool).tril(2)
    parts = {"k": codes[0], "ks": scales[0], "v": codes[1], "vs": scales[1], "mask": mask}
    return {"q": torch.randn(2, 4, 3, 16), **parts}


def test_attention_reads_the_codes_of_a_cache() -> None:
    program = Program.parse(ATTENTION.format(mask="bool", axis=2, shape="[size, 2, 2, tokens, 16]"))
    made = rewrite(program)
    assert calls(made) == ["attend_codes"]
    feeds = attention_feeds()
    assert drift(made.program.run(feeds), program.run(feeds)) < 1e-6


@pytest.mark.parametrize(
    ("mask", "axis", "shape"),
    [("f32", 2, "[size, 2, 2, tokens, 16]"), ("bool", 1, "[size, 2, 2, tokens, 16]")],
)
def test_other_attentions_stay(mask: str, axis: int, shape: str) -> None:
    """A mask of numbers; heads repeated one after the other, [a b] as [a b a b], where queries want [a a b b]."""
    made = rewrite(Program.parse(ATTENTION.format(mask=mask, axis=axis, shape=shape)))
    assert calls(made) == []
    if mask == "f32":
        assert any("mask" in note for note in made.notes)


def test_obstacles_are_said_first() -> None:
    program = Program.parse(LINEAR.format(n=16, k=64))
    qcompile.run_passes(program, "insert-qdq(weights=int4 group=8)")
    (unrounded,) = TritonBackend().obstacles(program)
    assert "not rounded yet" in unrounded.reason
    qcompile.run_passes(program, "rtn")
    (small,) = TritonBackend().obstacles(program)
    assert "groups of 8" in small.reason
    assert "multiple of 16" in small.reason
