"""inject-stream-outliers: the function stays, a few channels of the stream hold its energy; what forbids it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompile.drift import drift, observe
from qcompile.errors import QCompileError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.pass_base import Report, parse_pass
from qcompile.pass_manager import PassManager

Make = Callable[[str], Program]
STREAM = """\
def main(input_ids: i64[batch, sequence], *, table: f64[90, 8], up: f64[6, 8], c: f64[6], down: f64[8, 6], e: f64[8],
         head: f64[5, 8]):
    x = aten.embedding.default(table, input_ids)
    n = aten.rms_norm.default(x, [8], None, 0.01)
    a = aten.linear.default(n, up, c)
    r = aten.silu.default(a)
    d = aten.linear.default(r, down, e)
    z = aten.add.Tensor(x, d)
    m = aten.rms_norm.default(z, [8], None, 0.01)
    y = aten.linear.default(m, head)
    return {"y": y}"""


def inject(program: Program, tokens: list[Tensor], text: str = "inject-stream-outliers") -> Report:
    (report,) = PassManager([parse_pass(text)], batches=tokens).run(program)
    return report


def second_moment(program: Program, tokens: list[Tensor], width: int) -> Tensor:
    """Σ xxᵀ over whatever distinct tensors of `width` channels norms hand to products."""
    read = {c.input for c in find_contractions(program) if c.input.target is torch.ops.aten.rms_norm.default}
    total = torch.zeros(width, width, dtype=torch.float64)

    def look(node: fx.Node, value: Any) -> None:
        if node in read:
            rows = value.reshape(-1, width)
            total.add_(torch.einsum("ti,tj->ij", rows, rows))

    for batch in tokens:
        run(program, fill(program, {"input_ids": batch}), look)
    return total


@pytest.mark.parametrize("name", ["opt", "moe"])
def test_embedded_models(name: str, folded: Make, tokens: list[Tensor], peaks: Callable[..., dict[str, float]]) -> None:
    program = folded(name)
    feeds = fill(program, {"input_ids": torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(8))})
    expected, clean = observe(program, feeds), peaks(program)
    report = inject(program, tokens)
    assert drift(observe(program, feeds), expected) <= 1e-10
    assert len(report.rewritten) == 1
    assert report.skipped == []
    (shares,) = report.measured.values()
    assert shares["after"] > 2 * shares["before"]
    hurt = peaks(program)
    grown = [hurt[product] / clean[product] for product in clean]
    moved = [factor for factor in grown if abs(factor - 1) > 1e-6]
    assert len(moved) == {"opt": 21, "moe": 16}[name]  # what is read inside the blocks stays
    assert sum(moved) > 1.4 * len(moved)


def test_channels_are_the_principal_axes(tokens: list[Tensor]) -> None:
    program = Program.parse(STREAM)
    before = second_moment(program, tokens, 8)
    report = inject(program, tokens)
    after = second_moment(program, tokens, 8)
    energies = after.diagonal()
    assert (after - energies.diag()).abs().max() <= 1e-10 * energies.max()  # what channels hold is uncorrelated
    torch.testing.assert_close(energies.sort().values, torch.linalg.eigvalsh(before))
    assert not torch.equal(energies, energies.sort().values)
    (shares,) = report.measured.values()
    assert shares["after"] == pytest.approx(float(energies.sort().values[-4:].sum() / energies.sum()))
    assert shares["before"] == pytest.approx(float(before.diagonal().sort().values[-4:].sum() / before.trace()))


def test_every_weight_of_the_stream_moves_and_no_other(tokens: list[Tensor]) -> None:
    program, before = Program.parse(STREAM), Program.parse(STREAM).weights
    report = inject(program, tokens)
    moved = {key for key in before if not torch.equal(program.weights[key], before[key])}
    assert moved == {"table", "down", "e", "up", "head"}
    assert [e.where for e in report.rewritten] == ["table … head"]


def test_the_seed_deals_out_the_axes(tokens: list[Tensor]) -> None:
    heads = []
    for text in ("inject-stream-outliers", "inject-stream-outliers", "inject-stream-outliers(seed=1)"):
        program = Program.parse(STREAM)
        inject(program, tokens, text)
        heads.append(program.weights["head"])
    assert torch.equal(heads[0], heads[1])
    assert not torch.allclose(heads[0], heads[2])
    torch.testing.assert_close(heads[0].norm(dim=0).sort().values, heads[2].norm(dim=0).sort().values)


def left_alone(text: str, tokens: list[Tensor]) -> list[str]:
    program, before = Program.parse(text), Program.parse(text).weights
    report = inject(program, tokens)
    assert report.rewritten == []
    assert all(torch.equal(program.weights[key], before[key]) for key in before)
    return [f"{entry.where}: {entry.what}" for entry in report.skipped]


def test_leaves_a_stream_with_a_gain(tokens: list[Tensor]) -> None:
    text = STREAM.replace("z, [8], None", "z, [8], gain").replace("e: f64[8]", "e: f64[8], gain: f64[8]")
    (skipped,) = left_alone(text, tokens)
    assert skipped.startswith("n: m: its gain scales each channel")


PART = """\
def main(input_ids: i64[batch, sequence], *, table: f64[90, 8], up: f64[4, 16]):
    x = aten.embedding.default(table, input_ids)
    n = aten.rms_norm.default(x, [8], None, 0.01)
    part = aten.slice.Tensor(up, 1, 8, 16)
    y = aten.linear.default(n, part)
    return {"y": y}"""
TWICE = """\
def main(input_ids: i64[batch, sequence], *, table: f64[90, 8], up: f64[4, 16]):
    x = aten.embedding.default(table, input_ids)
    n = aten.rms_norm.default(x, [8], None, 0.01)
    both = aten.cat.default([n, n], -1)
    y = aten.linear.default(both, up)
    return {"y": y}"""


def test_leaves_a_stream_that_only_part_of_a_weight_reads(tokens: list[Tensor]) -> None:
    reason = "no product with all of a weight reads it, so its axes are not known"
    assert left_alone(PART, tokens) == [f"table … up: {reason}"]


def test_leaves_channels_that_stand_twice_in_a_weight(tokens: list[Tensor]) -> None:
    assert left_alone(TWICE, tokens) == ["n: its channels stand twice in the weight of a product"]


def test_needs_tokens() -> None:
    with pytest.raises(QCompileError, match="the calibration data has no tokens"):
        inject(Program.parse(STREAM), [])
