"""rotate: residual streams (R1): which weights are rotated, which stop it and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.drift import drift
from qcompile.hadamard.rotation import Hadamard, RandomOrthogonal
from qcompile.ir.program import Program
from qcompile.pass_manager import PassManager
from qcompile.passes.rotate.rotate import Rotate

R1 = Rotate(heads=False)
WEIGHTS = "table: f64[9, 8], up: f64[6, 8], c: f64[6], down: f64[8, 6], e: f64[8], head: f64[5, 8]"
BODY = """x = aten.embedding.default(table, ids)
          n = aten.rms_norm.default(x, [8], None, 0.01)
          a = aten.linear.default(n, up, c)
          r = aten.silu.default(a)
          d = aten.linear.default(r, down, e)
          z = aten.add.Tensor(x, d)
          m = aten.rms_norm.default(z, [8], None, 0.01)
          y = aten.linear.default(m, head)"""
SOURCES = {"table": 1, "down": 0, "e": 0}
SINKS = {"up": 1, "head": 1}


def moved(program: Program, before: Any) -> set[str]:
    return {key for key in before if key not in program.weights or not torch.equal(program.weights[key], before[key])}


@pytest.mark.parametrize(
    ("options", "rotation"),
    [
        ({}, Hadamard.of(8, signs_seed=0)),
        ({"seed": 3}, Hadamard.of(8, signs_seed=3)),
        ({"mode": "hadamard"}, Hadamard.of(8)),
        ({"mode": "random", "seed": 2}, RandomOrthogonal(8, 2)),
        ({"block": 4}, Hadamard.of(8, 4, 0)),
    ],
    ids=["signed", "another seed", "plain", "random", "block"],
)
def test_every_weight_of_a_stream(options: dict[str, Any], rotation: Any, text: Any, rotated: Any) -> None:
    written = text("ids: i64[batch, sequence]", WEIGHTS, BODY)
    before = Program.parse(written).weights
    program, report = rotated(written, Rotate(heads=False, **options))
    matrix = rotation.matrix()
    for key, axis in {**SOURCES, **SINKS}.items():
        expected = torch.tensordot(before[key], matrix, ([axis], [1])).movedim(-1, axis)
        assert torch.allclose(program.weights[key], expected, atol=1e-13), key
    assert moved(program, before) == {*SOURCES, *SINKS}
    assert [(e.where, e.what) for e in report.rewritten] == [("table … head", f"R1: {rotation}, 3 sources, 2 sinks")]
    assert report.measured["rotations"] == {"R1": 1, "R2": 0, "R3": 0, "R4": 0}
    assert report.skipped == []
    assert len(program.nodes) == len(Program.parse(written).nodes)


def test_attention_and_feed_forward_side_by_side(text: Any, rotated: Any) -> None:
    written = text(
        "ids: i64[batch, sequence]",
        WEIGHTS + ", v: f64[8, 8], o: f64[8, 8]",
        BODY.replace(
            "z = aten.add.Tensor(x, d)",
            "v1 = aten.linear.default(n, v)\no1 = aten.linear.default(v1, o)\nd1 = aten.add.Tensor(d, o1)\nz = aten.add.Tensor(d1, x)",
        ),
    )
    before = Program.parse(written).weights
    program, report = rotated(written, R1)
    assert moved(program, before) == {"table", "up", "down", "e", "head", "v", "o"}
    assert report.rewritten[0].what.endswith("4 sources, 3 sinks")


def test_a_tied_table_needs_no_copy_where_both_readers_want_the_same(text: Any, rotated: Any) -> None:
    written = text("ids: i64[batch, sequence]", WEIGHTS.replace(", head: f64[5, 8]", ""), BODY.replace("head", "table"))
    program, report = rotated(written, R1)
    assert report.notes == []
    assert set(program.weights) == {"table", "up", "c", "down", "e"}


def test_a_tied_table_is_parted_where_one_reader_cannot(text: Any, rotated: Any) -> None:
    """The gain before the head stops the rotation there: the head shares no space with the stream."""
    written = text(
        "ids: i64[batch, sequence]",
        WEIGHTS.replace("head: f64[5, 8]", "g: f64[8]"),
        BODY.replace("head", "table").replace("aten.rms_norm.default(z, [8], None", "aten.rms_norm.default(z, [8], g"),
    )
    _, report = rotated(written, R1)
    assert report.measured["rotations"]["R1"] == 0
    assert any("its gain scales each channel" in e.what for e in report.skipped)


def test_two_streams_have_signs_of_their_own(text: Any, rotated: Any) -> None:
    written = text(
        "ids: i64[batch, sequence]",
        "table: f64[9, 8], w: f64[8, 8], head: f64[5, 8]",
        """x = aten.embedding.default(table, ids)
        n = aten.rms_norm.default(x, [8], None, 0.01)
        z = aten.linear.default(n, w)
        m = aten.rms_norm.default(z, [8], None, 0.01)
        y = aten.linear.default(m, head)""",
    )
    _, report = rotated(written, Rotate(seed=5))
    assert [e.what.split(",")[0] for e in report.rewritten] == [
        "R1: hadamard width=8 block=8 signs=5",
        "R1: hadamard width=8 block=8 signs=6",
    ]


@pytest.mark.parametrize(
    ("old", "new", "reason"),
    [
        ("n = aten.rms_norm.default(x, [8], None", "n = aten.rms_norm.default(x, [8], e", "n: its gain scales each channel"),
        ("n = aten.rms_norm.default(x, [8], None", "n = aten.layer_norm.default(x, [8], None, None", "n: subtracts the mean over channels (center-norm makes it an RMS norm)"),
        ("z = aten.add.Tensor(x, d)", "k = aten.relu.default(d)\nz = aten.add.Tensor(x, k)", "k: relu bends each element"),
        ("z = aten.add.Tensor(x, d)", "k = aten.mul.Tensor(n, d)\nz = aten.add.Tensor(x, k)", "k: multiplies channel by channel"),
        ("z = aten.add.Tensor(x, d)", "k = aten.atan.default(d)\nz = aten.add.Tensor(x, k)", "z: adds what no weight makes"),
        ("z = aten.add.Tensor(x, d)", "k = aten.mul.Tensor(d, e)\nz = aten.add.Tensor(x, k)", "k: its gain scales each channel"),
        ("z = aten.add.Tensor(x, d)", "k = aten.add.Scalar(d, 1.0)\nz = aten.add.Tensor(x, k)", "k: adds a number to each element"),
    ],
    ids=["gain", "layer norm", "relu", "gate", "unknown operator", "a gain on the way", "a number"],
)  # fmt: skip
def test_what_stops(old: str, new: str, reason: str, text: Any, rotated: Any) -> None:
    assert old in BODY
    written = text("ids: i64[batch, sequence]", WEIGHTS, BODY.replace(old, new))
    before = Program.parse(written).weights
    program, report = rotated(written, R1)
    assert moved(program, before) == set()
    assert report.rewritten == []
    assert report.measured["rotations"]["R1"] == 0
    assert reason in "; ".join(e.what for e in report.skipped)


def test_a_gain_behind_a_norm_in_the_stream_stops(text: Any, rotated: Any) -> None:
    """A norm behind the branch, as some decoders have: its gain is added to the stream."""
    written = text(
        "ids: i64[batch, sequence]",
        WEIGHTS + ", g: f64[8]",
        BODY.replace(
            "z = aten.add.Tensor(x, d)", "k = aten.rms_norm.default(d, [8], g, 0.01)\nz = aten.add.Tensor(x, k)"
        ),
    )
    before = Program.parse(written).weights
    program, report = rotated(written, R1)
    assert moved(program, before) == set()
    assert "k: its gain scales each channel" in "; ".join(e.what for e in report.skipped)


def test_a_returned_hidden_state_stops(text: Any, rotated: Any) -> None:
    written = text("ids: i64[batch, sequence]", WEIGHTS, BODY, "y z")
    before = Program.parse(written).weights
    program, report = rotated(written, R1)
    assert moved(program, before) == set()
    assert "output: is returned as 'z'" in "; ".join(e.what for e in report.skipped)


def test_an_input_in_the_stream_stops(text: Any, rotated: Any) -> None:
    written = text(
        "ids: i64[batch, sequence], i: f64[batch, sequence, 8]",
        WEIGHTS,
        BODY.replace("aten.add.Tensor(x, d)", "aten.add.Tensor(i, d)"),
    )
    program, report = rotated(written, R1)
    before = Program.parse(written).weights
    assert not {"down", "e", "head"} & moved(program, before)
    assert "z: adds what no weight makes" in "; ".join(e.what for e in report.skipped)


def test_a_width_without_a_hadamard_matrix(text: Any, rotated: Any) -> None:
    written = (
        text("ids: i64[batch, sequence]", WEIGHTS, BODY).replace("8]", "6]").replace("down: f64[8,", "down: f64[6,")
    )
    before = Program.parse(written).weights
    program, report = rotated(written, R1)
    assert moved(program, before) == set()
    assert [(e.where, e.what) for e in report.skipped] == [
        (
            "table … head",
            "no Hadamard matrix of order 6: an order is 1, 2 or a multiple of 4; widths that would do: 4, 8; "
            "or a block of 2 or 1",
        )
    ]
    program, report = rotated(written, Rotate(heads=False, block=2))
    assert len(report.rewritten) == 1
    program, report = rotated(written, Rotate(heads=False, mode="random"))
    assert len(report.rewritten) == 1


def test_a_block_that_does_not_divide(text: Any, rotated: Any) -> None:
    _, report = rotated(text("ids: i64[batch, sequence]", WEIGHTS, BODY), Rotate(heads=False, block=3))
    assert [e.what for e in report.skipped] == [
        "a block of 3 does not divide 8 channels; blocks that would do: 8 or 4 or 2"
    ]


def test_without_streams_nothing_is_rotated_or_said(text: Any, rotated: Any) -> None:
    _, report = rotated(text("ids: i64[batch, sequence]", WEIGHTS, BODY), Rotate(stream=False))
    assert report.rewritten == report.skipped == []


def test_bfloat16_is_rounded_once(text: Any, feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = Program.parse(text("ids: i64[batch, sequence]", WEIGHTS, BODY).replace("f64", "bf16"))
    before = {key: tensor.double() for key, tensor in program.weights.items()}
    inputs = feeds(program)
    expected = program.run(inputs)
    PassManager([R1]).run(program)
    matrix = Hadamard.of(8, signs_seed=0).matrix()
    for key, axis in {**SOURCES, **SINKS}.items():
        exact = torch.tensordot(before[key], matrix, ([axis], [1])).movedim(-1, axis)
        assert torch.equal(program.weights[key], exact.bfloat16()), key
    assert drift(program.run(inputs), expected) < 0.05
