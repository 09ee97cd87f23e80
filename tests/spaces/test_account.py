"""What passes say of every space: what became of it, or which operator forbids it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Report, parse_pass
from qcompile.report import CompileReport

LAYER = """\
    n{i} = aten.rms_norm.default(x{i}, [8], None, 0.01)  # layers.{i}.norm
    gate{i} = aten.linear.default(n{i}, g{i})  # layers.{i}.gate
    bent{i} = aten.silu.default(gate{i})  # layers.{i}
    up{i} = aten.linear.default(n{i}, u{i})  # layers.{i}.up
    both{i} = aten.mul.Tensor(bent{i}, up{i})  # layers.{i}
    down{i} = aten.linear.default(both{i}, d{i})  # layers.{i}.down
    x{j} = aten.add.Tensor(x{i}, down{i})
"""
WEIGHTS = 'g{i}: f64[4, 8] = "layers.{i}.gate.weight", u{i}: f64[4, 8] = "layers.{i}.up.weight", '
WEIGHTS += 'd{i}: f64[8, 4] = "layers.{i}.down.weight", '


def gated(layers: int = 2, end: str = "") -> Program:
    """A stream with gated blocks, and a head."""
    lines = "".join(LAYER.format(i=i, j=i + 1) for i in range(layers))
    weights = "".join(WEIGHTS.format(i=i) for i in range(layers))
    return Program.parse(
        f'def main(input_ids: i64[batch, sequence], *, table: f64[9, 8] = "embed.weight", {weights}h: f64[9, 8] = "head.weight"):\n'
        f"    x0 = aten.embedding.default(table, input_ids)  # embed\n{lines}"
        f"    y = aten.linear.default(x{layers}, h)  # head\n{end}"
        f'    return {{"y": y}}\n'
    )


def applied(program: Program, text: str) -> list[tuple[str, str]]:
    made = parse_pass(text)
    if isinstance(made, CalibratedPass):
        report = made.run_calibrated(program, [torch.arange(8).view(2, 4)])
    else:
        report = made.run(program)
    return [(e.where, e.what) for e in report.spaces]


STREAM, BLOCKS, UPS, HEAD = (
    "embed … head: stream, 8",
    "layers.0–1: hidden × 2, 4",
    "layers.0–1: hidden × 2, 4",
    "head: output, 9",
)
RETURNED = (HEAD, "left alone: output: is returned as 'y'")


@pytest.mark.parametrize(
    ("pass_", "fates"),
    [
        (
            "rotate",
            [
                "R1: hadamard width=8 block=8 signs=0",
                "left alone: bent0 … bent1: silu bends each element; both0 … both1: multiplies channel by channel",
                "left alone: both0 … both1: multiplies channel by channel",
            ],
        ),
        (
            "rotate(stream=false, orphans=true)",
            [
                "left alone: stream=false",
                "rotated online; not in its weights: bent0 … bent1: silu bends each element; "
                "both0 … both1: multiplies channel by channel",
                "rotated online; not in its weights: both0 … both1: multiplies channel by channel",
            ],
        ),
        (
            "permute",
            ["stream: sorted by the score of 5 sinks", *["hidden: sorted by the score of 1 sinks"] * 2],
        ),
        ("permute(hidden=false)", ["stream: sorted by the score of 5 sinks", *["left alone: hidden=false"] * 2]),
        (
            "equalize",
            [
                "left alone: n0 … n1: divides each vector by its length",
                "left alone: bent0 … bent1: silu bends each element; both0 … both1: multiplies channel by channel",
                "equalized between 2 weights",
            ],
        ),
        (
            "smooth(alpha=0.25)",
            [
                "left alone: n0 … n1: divides each vector by its length",
                "left alone: bent0 … bent1: silu bends each element; both0 … both1: multiplies channel by channel",
                "smoothed, alpha 0.25",
            ],
        ),
    ],
)
def test_every_space_has_a_line(pass_: str, fates: list[str]) -> None:
    assert applied(gated(), pass_) == [*zip((STREAM, BLOCKS, UPS), fates, strict=True), RETURNED]


def test_layers_with_another_fate_have_a_line_of_their_own() -> None:
    lines = applied(gated(3), "smooth(rules=[{match: layers.1.*, alpha: null}])")
    assert [(where, what) for where, what in lines if where.startswith("layers") and "bent" not in what] == [
        ("layers.[0, 2]: hidden × 2, 4", "smoothed, alpha 0.5"),
        ("layers.1: hidden, 4", "left alone: rules.0 says alpha: null"),
    ]


def test_an_operator_that_rotates_when_the_program_runs_is_named() -> None:
    program = gated()
    parse_pass("rotate(stream=false, orphans=true)").run(program)
    lines = dict(applied(program, "permute(stream=false)"))
    assert lines["layers.0–1: output × 2, 4"].endswith(": rotates its channels when the model runs")


def test_what_stands_between_is_named_before_what_limits_elsewhere() -> None:
    program = Program.parse("""\
def main(x: f64[batch, 8], *, a: f64[4, 8], b: f64[5, 4]):
    h = aten.linear.default(x, a)
    k1 = aten.atan.default(h)
    k2 = aten.atan.default(h)
    k3 = aten.atan.default(h)
    t = qcompile.hadamard.default(h, 4, 4)
    y = aten.linear.default(t, b)
    return {"y": y, "k1": k1, "k2": k2, "k3": k3}""")
    report = parse_pass("permute").run(program)
    assert [(e.where, e.what) for e in report.skipped] == [
        ("h", "reads no channels that a weight makes"),
        ("y", "t: rotates its channels when the model runs"),
    ]


def test_a_weight_of_which_a_part_may_be_scaled() -> None:
    program = Program.parse("""\
def main(x: f64[batch, 8], *, a: f64[12, 8], b: f64[8, 6]):
    y = aten.linear.default(x, a)
    g = aten.slice.Tensor(y, -1, 0, 12, 2)
    u = aten.slice.Tensor(y, -1, 1, 12, 2)
    s = aten.silu.default(g)
    m = aten.mul.Tensor(s, u)
    out = aten.linear.default(m, b)
    return {"out": out}""")
    assert applied(program, "equalize")[0] == ("a … b: hidden, 6", "equalized between 2 weights")


def test_reports_are_written_and_read_with_it(tmp_path: Path) -> None:
    report = Report("rotate")
    report.spaces = parse_pass("rotate").run(gated()).spaces
    CompileReport(passes=[report]).write(tmp_path / "report.json")
    assert CompileReport.read(tmp_path / "report.json").passes == [report]
