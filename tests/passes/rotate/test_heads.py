"""rotate: values, head by head (R2), however heads are shared and however projections are fused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from qcompile.hadamard.rotation import Hadamard
from qcompile.ir.program import Program
from qcompile.passes.rotate.rotate import Rotate

R2 = Rotate(stream=False)
INPUTS = "x: f64[batch, sequence, 6]"
SEPARATE = "q: f64[16, 6], k: f64[8, 6], v: f64[8, 6], c: f64[8], o: f64[5, 16]"
HEADS = """q0 = aten.linear.default(x, q)
           k0 = aten.linear.default(x, k)
           v0 = aten.linear.default(x, v, c)
           q1 = aten.unflatten.int(q0, -1, [4, 4])
           k1 = aten.unflatten.int(k0, -1, [2, 4])
           v1 = aten.unflatten.int(v0, -1, [2, 4])
           q2 = aten.transpose.int(q1, 1, 2)
           k2 = aten.transpose.int(k1, 1, 2)
           v2 = aten.transpose.int(v1, 1, 2)"""
OUT = """a1 = aten.transpose.int(a, 1, 2)
         a2 = aten.flatten.using_ints(a1, 2, 3)
         y = aten.linear.default(a2, o)"""
EXPANDED = """n = aten.sym_size.int(x, 1)
    b = aten.sym_size.int(x, 0)
    {t}3 = aten.unsqueeze.default({t}2, 2)
    {t}4 = aten.expand.default({t}3, [b, 2, 2, n, 4])
    {t}5 = aten.reshape.default({t}4, [b, 4, n, 4])"""
SHARED = {
    "enable_gqa": "a = aten.scaled_dot_product_attention.default(q2, k2, v2, is_causal=True, enable_gqa=True)",
    "repeat_interleave": """k5 = aten.repeat_interleave.self_int(k2, 2, 1)
    v5 = aten.repeat_interleave.self_int(v2, 2, 1)
    a = aten.scaled_dot_product_attention.default(q2, k5, v5)""",
    "expand": EXPANDED.format(t="k") + EXPANDED.format(t="v").replace("n = ", "n_ = ").replace("b = ", "b_ = ")
    .replace("[b,", "[b_,").replace(" n, 4]", " n_, 4]").replace("n_ = aten", "\n    n_ = aten", 1)
    + "\n    a = aten.scaled_dot_product_attention.default(q2, k5, v5)",
    "spelled": """k5 = aten.repeat_interleave.self_int(k2, 2, 1)
    v5 = aten.repeat_interleave.self_int(v2, 2, 1)
    t = aten.transpose.int(k5, 2, 3)
    s = aten.matmul.default(q2, t)
    p = aten.softmax.int(s, -1)
    a = aten.matmul.default(p, v5)""",
}  # fmt: skip


def head_by_head(weight: torch.Tensor, axis: int, heads: int) -> torch.Tensor:
    """A weight after the rotation of each head along an axis."""
    matrix = Hadamard.of(4, signs_seed=0).matrix()
    split = weight.unflatten(axis, (heads, 4))
    return torch.tensordot(split, matrix, ([axis + 1], [1])).movedim(-1, axis + 1).flatten(axis, axis + 1)


@pytest.mark.parametrize("shared", SHARED)
def test_heads_of_a_group(shared: str, text: Any, rotated: Any) -> None:
    written = text(INPUTS, SEPARATE, f"{HEADS}\n{SHARED[shared]}\n{OUT}")
    before = Program.parse(written).weights
    program, report = rotated(written, R2)
    assert report.measured["rotations"]["R2"] == 2
    assert torch.allclose(program.weights["v"], head_by_head(before["v"], 0, 2), atol=1e-13)
    assert torch.allclose(program.weights["c"], head_by_head(before["c"], 0, 2), atol=1e-13)
    assert torch.allclose(program.weights["o"], head_by_head(before["o"], 1, 4), atol=1e-13)
    assert torch.equal(program.weights["q"], before["q"])
    assert torch.equal(program.weights["k"], before["k"])
    rotation = Hadamard.of(4, signs_seed=0)
    assert [(e.where, e.what) for e in report.rewritten] == [
        ("v … o", f"R2: {rotation}, 2 sources, 1 sinks")
    ] * 2  # the weight and its bias


FUSED = {
    "split": """f = aten.linear.default(x, w, c)
    parts = aten.split_with_sizes.default(f, [8, 8, 8], -1)
    q0 = operator.getitem(parts, 0)
    k0 = operator.getitem(parts, 1)
    v0 = operator.getitem(parts, 2)
    q1 = aten.unflatten.int(q0, -1, [2, 4])
    k1 = aten.unflatten.int(k0, -1, [2, 4])
    v1 = aten.unflatten.int(v0, -1, [2, 4])""",
    "chunk": """f = aten.linear.default(x, w, c)
    parts = aten.chunk.default(f, 3, -1)
    q0 = operator.getitem(parts, 0)
    k0 = operator.getitem(parts, 1)
    v0 = operator.getitem(parts, 2)
    q1 = aten.unflatten.int(q0, -1, [2, 4])
    k1 = aten.unflatten.int(k0, -1, [2, 4])
    v1 = aten.unflatten.int(v0, -1, [2, 4])""",
    "slices": """f = aten.linear.default(x, w, c)
    q0 = aten.slice.Tensor(f, -1, 0, 8)
    k0 = aten.slice.Tensor(f, -1, 8, 16)
    v0 = aten.slice.Tensor(f, -1, 16, 24)
    q1 = aten.unflatten.int(q0, -1, [2, 4])
    k1 = aten.unflatten.int(k0, -1, [2, 4])
    v1 = aten.unflatten.int(v0, -1, [2, 4])""",
    "unbind": """f = aten.linear.default(x, w, c)
    g = aten.unflatten.int(f, -1, [3, 2, 4])
    parts = aten.unbind.int(g, 2)
    q1 = operator.getitem(parts, 0)
    k1 = operator.getitem(parts, 1)
    v1 = operator.getitem(parts, 2)""",
}


@pytest.mark.parametrize("fused", FUSED)
def test_a_fused_projection(fused: str, text: Any, rotated: Any) -> None:
    body = (
        FUSED[fused]
        + """
    q2 = aten.transpose.int(q1, 1, 2)
    k2 = aten.transpose.int(k1, 1, 2)
    v2 = aten.transpose.int(v1, 1, 2)
    a = aten.scaled_dot_product_attention.default(q2, k2, v2)
    """
        + OUT
    )
    written = text(INPUTS, "w: f64[24, 6], c: f64[24], o: f64[5, 8]", body)
    before = Program.parse(written).weights
    program, report = rotated(written, R2)
    assert report.measured["rotations"]["R2"] == 2
    for key in ("w", "c"):
        assert torch.equal(program.weights[key][:16], before[key][:16])
        assert torch.allclose(program.weights[key][16:], head_by_head(before[key][16:], 0, 2), atol=1e-13)
    assert torch.allclose(program.weights["o"], head_by_head(before["o"], 1, 2), atol=1e-13)


def test_heads_interleaved_in_one_projection(text: Any, rotated: Any) -> None:
    """Each head's q, k and v side by side."""
    body = f"""f = aten.linear.default(x, w, c)
    g = aten.unflatten.int(f, -1, [2, 3, 4])
    q1 = aten.select.int(g, 3, 0)
    k1 = aten.select.int(g, 3, 1)
    v1 = aten.select.int(g, 3, 2)
    q2 = aten.transpose.int(q1, 1, 2)
    k2 = aten.transpose.int(k1, 1, 2)
    v2 = aten.transpose.int(v1, 1, 2)
    a = aten.scaled_dot_product_attention.default(q2, k2, v2)
    {OUT}"""
    written = text(INPUTS, "w: f64[24, 6], c: f64[24], o: f64[5, 8]", body)
    before = Program.parse(written).weights
    program, report = rotated(written, R2)
    assert report.measured["rotations"]["R2"] == 2
    rows = [*range(8, 12), *range(20, 24)]
    assert torch.allclose(program.weights["w"][rows], head_by_head(before["w"][rows], 0, 2), atol=1e-13)


def test_a_cache_of_values_holds_rotated_ones(text: Any, rotated: Any) -> None:
    written = text(
        f"{INPUTS}, past_key_values_0_key: f64[batch, 2, past, 4], past_key_values_0_value: f64[batch, 2, past, 4]",
        SEPARATE,
        f"""{HEADS}
        present_0_key = aten.cat.default([past_key_values_0_key, k2], 2)
        present_0_value = aten.cat.default([past_key_values_0_value, v2], 2)
        a = aten.scaled_dot_product_attention.default(q2, present_0_key, present_0_value, enable_gqa=True)
        {OUT}""",
        "y present_0_key present_0_value",
    )
    before = Program.parse(written).weights
    program, report = rotated(written, R2)
    assert report.measured["rotations"]["R2"] == 2
    assert torch.allclose(program.weights["v"], head_by_head(before["v"], 0, 2), atol=1e-13)


@pytest.mark.parametrize(
    "gate",
    ["g = aten.sigmoid.default(q0)\na3 = aten.mul.Tensor(a2, g)", "a3 = aten.tanh.default(a2)"],
    ids=["gate", "tanh"],
)
def test_a_gate_behind_attention_stops(gate: str, text: Any, rotated: Any) -> None:
    body = f"{HEADS}\n{SHARED['enable_gqa']}\n{OUT}".replace(
        "y = aten.linear.default(a2,", f"{gate}\ny = aten.linear.default(a3,"
    )
    _, report = rotated(text(INPUTS, SEPARATE, body), R2)
    assert report.measured["rotations"]["R2"] == 0
    assert report.rewritten == []


def test_values_that_are_returned_stay(text: Any, rotated: Any) -> None:
    _, report = rotated(text(INPUTS, SEPARATE, f"{HEADS}\n{SHARED['enable_gqa']}\n{OUT}", "y v2"), R2)
    assert report.measured["rotations"]["R2"] == 0


def test_a_head_of_a_width_without_a_hadamard_matrix(text: Any, rotated: Any) -> None:
    body = f"{HEADS}\n{SHARED['enable_gqa']}\n{OUT}".replace("[4, 4]", "[4, 6]").replace("[2, 4]", "[2, 6]")
    weights = SEPARATE.replace("16", "24").replace("8", "12")
    _, report = rotated(text(INPUTS, weights, body), R2)
    assert report.measured["rotations"]["R2"] == 0
    assert {e.what for e in report.skipped} == {
        "no Hadamard matrix of order 6: an order is 1, 2 or a multiple of 4; widths that would do: 4, 8; "
        "or a block of 2 or 1"
    }


def test_streams_alone_leave_heads(text: Any, rotated: Any) -> None:
    _, report = rotated(text(INPUTS, SEPARATE, f"{HEADS}\n{SHARED['enable_gqa']}\n{OUT}"), Rotate(heads=False))
    assert report.rewritten == []
