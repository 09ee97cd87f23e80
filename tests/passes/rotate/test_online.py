"""rotate and rotate-layerwise: transforms that are computed when the model runs (R3, R4)."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import fx

from qcompile.hadamard.rotation import Hadamard
from qcompile.ir.program import Program
from qcompile.passes.rotate.inputs import Rotated
from qcompile.passes.rotate.rotate import Rotate
from qcompile.passes.rotate.rotate_layerwise import RotateLayerwise

TRANSFORM = torch.ops.qcompile.hadamard.default
R3 = Rotate(stream=False, heads=False, qk=True)
R4 = Rotate(stream=False, heads=False, orphans=True)
X = "x: f64[batch, sequence, 8]"


def transforms(program: Program) -> list[tuple[Any, ...]]:
    """What is transformed, with order and block."""
    return [tuple(a.name if isinstance(a, fx.Node) else a for a in n.args) for n in program.calls(TRANSFORM)]


def times_t(weight: torch.Tensor, axis: int, block: int) -> torch.Tensor:
    return torch.tensordot(weight, Hadamard(weight.shape[axis], block).matrix(), ([axis], [1])).movedim(-1, axis)


def test_layers_that_read_one_tensor_share_a_transform(text: Any, rotated: Any) -> None:
    written = text(
        X,
        "u: f64[6, 8], v: f64[5, 8], c: f64[5]",
        "y = aten.linear.default(x, u)\nz = aten.linear.default(x, v, c)",
        "y z",
    )
    before = Program.parse(written).weights
    program, report = rotated(written, RotateLayerwise())
    assert transforms(program) == [("x", 1, 8)]
    assert torch.allclose(program.weights["u"], times_t(before["u"], 1, 8), atol=1e-13)
    assert torch.allclose(program.weights["v"], times_t(before["v"], 1, 8), atol=1e-13)
    assert torch.equal(program.weights["c"], before["c"])
    assert [(e.where, e.what) for e in report.rewritten] == [
        (name, "its input is rotated online, 8 channels at a time") for name in ("y", "z")
    ]
    assert report.measured["rotations"] == {"online": 1}
    assert report.notes == []


def test_a_tensor_that_others_read_stays_for_them(text: Any, rotated: Any) -> None:
    program, _ = rotated(
        text(X, "u: f64[8, 8]", "a = aten.linear.default(x, u)\ny = aten.add.Tensor(a, x)"), RotateLayerwise()
    )
    (online,) = program.calls(TRANSFORM)
    assert [user.name for user in online.users] == ["a"]


def test_blocks(text: Any, rotated: Any) -> None:
    written = text("x: f64[batch, 12]", "u: f64[6, 12]", "y = aten.linear.default(x, u)")
    before = Program.parse(written).weights
    for block, order in ((None, 12), (12, 12), (4, 1), (2, 1)):
        program, _ = rotated(written, RotateLayerwise(block=block))
        assert transforms(program) == [("x", order, block or 12)]
        assert torch.allclose(program.weights["u"], times_t(before["u"], 1, block or 12), atol=1e-13)


def test_an_edit_is_the_same_in_place() -> None:
    weight = torch.randn(6, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    edit = Rotated(1, Hadamard(12, 12))
    wanted = times_t(weight, 1, 12)
    assert torch.allclose(edit.apply(weight), wanted, atol=1e-13)
    assert torch.allclose(edit.apply_into(weight.clone(), torch.empty_like(weight)), wanted, atol=1e-13)


def test_a_weight_in_out(text: Any, rotated: Any) -> None:
    written = text("x: f64[batch, 8]", "u: f64[8, 6], c: f64[6]", "y = aten.addmm.default(c, x, u)")
    before = Program.parse(written).weights
    program, _ = rotated(written, RotateLayerwise())
    assert torch.allclose(program.weights["u"], times_t(before["u"], 0, 8), atol=1e-13)


def test_a_weight_read_twice_is_edited_once(text: Any, rotated: Any) -> None:
    written = text(
        X, "u: f64[8, 8]", "a = aten.linear.default(x, u)\nr = aten.silu.default(a)\ny = aten.linear.default(r, u)"
    )
    before = Program.parse(written).weights
    program, report = rotated(written, RotateLayerwise())
    assert transforms(program) == [("x", 1, 8), ("r", 1, 8)]
    assert report.notes == []
    assert torch.allclose(program.weights["u"], times_t(before["u"], 1, 8), atol=1e-13)


def test_a_weight_that_an_embedding_reads_too_is_parted(text: Any, rotated: Any) -> None:
    written = text(
        "ids: i64[batch]",
        "t: f64[9, 8]",
        "x = aten.embedding.default(t, ids)\nr = aten.silu.default(x)\ny = aten.linear.default(r, t)",
    )
    before = Program.parse(written).weights
    program, report = rotated(written, RotateLayerwise())
    assert report.notes == ["'t' is untied for y: 0.0 MB more"]
    assert torch.equal(program.weights["t"], before["t"])
    assert torch.allclose(program.weights["t.untied"], times_t(before["t"], 1, 8), atol=1e-13)


def test_a_weight_read_in_two_directions_is_parted(text: Any, rotated: Any) -> None:
    body = (
        "a = aten.linear.default(x, u)\nr = aten.silu.default(a)\nt = aten.t.default(u)\ny = aten.linear.default(r, t)"
    )
    program, report = rotated(text(X, "u: f64[8, 8]", body), RotateLayerwise())
    assert len(transforms(program)) == 2
    assert len(report.notes) == 1


def test_a_weight_that_is_read_in_parts_is_left_alone(text: Any, rotated: Any) -> None:
    body = "p = aten.slice.Tensor(u, 1, 0, 8)\ny = aten.linear.default(x, p)"
    program, report = rotated(text(X, "u: f64[6, 12]", body), RotateLayerwise())
    assert transforms(program) == []
    assert [(e.where, e.what) for e in report.skipped] == [
        ("y", "it reads a part of its weight that is no run of blocks")
    ]


def test_a_stack_of_experts(text: Any, rotated: Any) -> None:
    written = text("x: f64[3, sequence, 8]", "u: f64[3, 8, 6]", "y = aten.bmm.default(x, u)")
    before = Program.parse(written).weights
    program, _ = rotated(written, RotateLayerwise())
    assert transforms(program) == [("x", 1, 8)]
    assert torch.allclose(program.weights["u"], times_t(before["u"], 1, 8), atol=1e-13)


@pytest.mark.parametrize(
    ("inputs", "weights", "body", "outputs", "reason"),
    [
        (X, "u: f64[6, 8]", "logits = aten.linear.default(x, u)", "logits", "a head: its input is not rotated online"),
        (X, "u: f64[6, 8]", "a = aten.linear.default(x, u)\nk = aten.topk.default(a, 2)\ny = operator.getitem(k, 0)", "y", "a router: its input is not rotated online"),
        ("x: f64[batch, 8, sequence]", "u: f64[6, 8, 1]", "y = aten.conv1d.default(x, u)", "y", "a convolution: its input is not rotated online"),
        ("x: f64[batch, 6]", "u: f64[5, 6]", "y = aten.linear.default(x, u)", "y", "no Hadamard matrix of order 6: an order is 1, 2 or a multiple of 4; widths that would do: 4, 8; or a block of 2 or 1"),
        (X, "u: i8[6, 8], s: f64[6, 1]", 'd = qcompile.dequantize.default(u, s, None, "int8 sym channel", torch.float64)\ny = aten.linear.default(x, d)', "y", "its weight is quantized already"),
    ],
    ids=["head", "router", "convolution", "width", "quantized"],
)  # fmt: skip
def test_what_is_left_alone(
    inputs: str, weights: str, body: str, outputs: str, reason: str, text: Any, rotated: Any
) -> None:
    for pass_ in (RotateLayerwise(), R4):
        program, report = rotated(text(inputs, weights, body, outputs), pass_)
        assert transforms(program) == []
        assert [e.what for e in report.skipped] == [reason]


def test_orphans_are_what_no_fused_rotation_reaches(text: Any, rotated: Any) -> None:
    written = text(
        "ids: i64[batch, sequence]",
        "table: f64[9, 8], up: f64[12, 8], gate: f64[12, 8], down: f64[8, 12], head: f64[5, 8]",
        """x = aten.embedding.default(table, ids)
        n = aten.rms_norm.default(x, [8], None, 0.01)
        u = aten.linear.default(n, up)
        g = aten.linear.default(n, gate)
        r = aten.silu.default(g)
        p = aten.mul.Tensor(u, r)
        d = aten.linear.default(p, down)
        z = aten.add.Tensor(x, d)
        m = aten.rms_norm.default(z, [8], None, 0.01)
        logits = aten.linear.default(m, head)""",
        "logits",
    )
    program, report = rotated(written, Rotate(orphans=True))
    assert report.measured["rotations"] == {"R1": 1, "R2": 0, "R3": 0, "R4": 1}
    assert transforms(program) == [("p", 12, 12)]


CACHED = """q0 = aten.linear.default(x, q)
    k0 = aten.linear.default(x, k)
    v0 = aten.linear.default(x, v)
    q1 = aten.unflatten.int(q0, -1, [4, 4])
    k1 = aten.unflatten.int(k0, -1, [2, 4])
    v1 = aten.unflatten.int(v0, -1, [2, 4])
    q2 = aten.transpose.int(q1, 1, 2)
    k2 = aten.transpose.int(k1, 1, 2)
    v2 = aten.transpose.int(v1, 1, 2)
    present_0_key = aten.cat.default([past_key_values_0_key, k2], 2)
    present_0_value = aten.cat.default([past_key_values_0_value, v2], 2)
    a = aten.scaled_dot_product_attention.default(q2, present_0_key, present_0_value, enable_gqa=True)
    a1 = aten.transpose.int(a, 1, 2)
    a2 = aten.flatten.using_ints(a1, 2, 3)
    y = aten.linear.default(a2, o)"""
CACHES = "past_key_values_0_key: f64[batch, 2, past, 4], past_key_values_0_value: f64[batch, 2, past, 4]"


@pytest.mark.parametrize("block", [None, 2])
def test_scores_with_a_cache(block: int | None, text: Any, rotated: Any) -> None:
    """Two steps, the second on the program's own cache, whose keys are rotated."""
    written = text(
        f"{X}, {CACHES}",
        "q: f64[16, 8], k: f64[8, 8], v: f64[8, 8], o: f64[5, 16]",
        CACHED,
        "y present_0_key present_0_value",
    )
    before = Program.parse(written).weights
    program, report = rotated(written, Rotate(stream=False, heads=False, qk=True, block=block))
    assert report.measured["rotations"]["R3"] == 1
    assert [e.what for e in report.rewritten] == [f"R3: queries and keys are rotated online, {block or 4} features"]
    assert [args[1:] for args in transforms(program)] == [(1, block or 4)] * 2
    assert all(torch.equal(program.weights[key], before[key]) for key in before)


def test_scores_of_a_width_without_a_hadamard_matrix(text: Any, rotated: Any) -> None:
    body = "a = aten.scaled_dot_product_attention.default(x, k, v)\ny = aten.relu.default(a)"
    _, report = rotated(
        text(
            "x: f64[batch, 2, sequence, 6], k: f64[batch, 2, 3, 6], v: f64[batch, 2, 3, 6]",
            "w: f64[2]",
            f"{body}\nz = aten.relu.default(w)",
            "y z",
        ),
        R3,
    )
    assert report.measured["rotations"]["R3"] == 0
    assert [e.where for e in report.skipped] == ["a"]
    assert report.skipped[0].what.startswith("no Hadamard matrix of order 6")


def test_a_second_run_leaves_scores_alone(text: Any, rotated: Any) -> None:
    written = text(
        f"{X}, {CACHES}",
        "q: f64[16, 8], k: f64[8, 8], v: f64[8, 8], o: f64[5, 16]",
        CACHED,
        "y present_0_key present_0_value",
    )
    program, _ = rotated(written, R3)
    report = R3.run(program)
    assert report.rewritten == []
    assert len(report.skipped) == 1
    assert "rotated already" in report.skipped[0].what


def test_heads_jointly(text: Any, rotated: Any) -> None:
    """One transform over all heads that the output projection reads; values, and a cache of them, stay."""
    written = text(
        f"{X}, {CACHES}",
        "q: f64[16, 8], k: f64[8, 8], v: f64[8, 8], o: f64[5, 16]",
        CACHED,
        "y present_0_key present_0_value",
    )
    before = Program.parse(written).weights
    program, report = rotated(written, Rotate(stream=False, joint=True))
    assert transforms(program) == [("a2", 1, 16)]
    assert {key for key in before if not torch.equal(program.weights[key], before[key])} == {"o"}
    assert torch.allclose(program.weights["o"], times_t(before["o"], 1, 16), atol=1e-13)
    assert report.measured["rotations"] == {"R1": 0, "R2": 1, "R3": 0, "R4": 0}
    assert [e.what for e in report.spaces if "rotates it" in e.what] == [
        "rotated online; not in its weights: joint=true rotates it with the other heads"
    ]


def test_heads_jointly_leaves_a_lone_vector_to_its_weights(text: Any, rotated: Any) -> None:
    body = "h = aten.linear.default(x, u)\ny = aten.linear.default(h, o)"
    program, report = rotated(text(X, "u: f64[4, 8], o: f64[3, 4]", body), Rotate(joint=True))
    assert transforms(program) == []
    assert report.measured["rotations"] == {"R1": 0, "R2": 1, "R3": 0, "R4": 0}
