"""MagR and AWQ's clipping do what their definitions say, and help."""

from __future__ import annotations

import pytest
import torch
from oracles import second_order
from rounding_cases import layer

from qcompile.errors import QCompileError
from qcompile.numerics import QuantSpec
from qcompile.rounding import GPTQ, AwqClip, Grid, MagR, Statistics, Stored, factor, recurse, round_matrix
from qcompile.rounding.shrink import l1_threshold
from qcompile.rounding.spectrum import largest_eigenvalue


def test_the_largest_eigenvalue() -> None:
    hessian = layer().statistics.hessian
    assert largest_eigenvalue(hessian) == pytest.approx(float(torch.linalg.eigvalsh(hessian)[-1]), rel=1e-4)
    assert largest_eigenvalue(torch.zeros(3, 3)) == 0.0


def test_thresholds_leave_rows_on_the_ball() -> None:
    rows = torch.rand(50, 33, generator=torch.Generator().manual_seed(0), dtype=torch.float64) ** 3
    rows[3] = 0
    rows[4] = 0.01
    rows[5, 1:] = 0
    theta = l1_threshold(rows, 1.5)
    left = (rows - theta.unsqueeze(1)).clamp(min=0).sum(1)
    torch.testing.assert_close(left, rows.sum(1).clamp(max=1.5))
    assert theta[[3, 4, 5]].tolist() == [0, 0, 0]


@pytest.mark.parametrize("group", [16, 64])
def test_magr(group: int) -> None:
    case = layer(rows=6)
    hessian = case.statistics.hessian
    expected = second_order.magr(case.weight, hessian, 0.02, 30, group)
    found = MagR(alpha=0.02, steps=30).shrunk(case.weight.t(), hessian, 64 // group)
    torch.testing.assert_close(found.t(), expected, rtol=1e-5, atol=1e-6)
    peaks = [w.reshape(6, -1, group).abs().amax(2) for w in (found.t(), case.weight)]
    assert bool((peaks[0] < peaks[1]).all())


def test_magr_helps_weights_with_peaks_where_inputs_leave_room() -> None:
    case, spec = layer(tokens=20), QuantSpec.parse("int3 sym channel")
    weight = case.weight**3
    stored, statistics = Stored.plain(spec, weight), Statistics(case.statistics.hessian)
    shrunk = MagR(alpha=0.1).shrunk(weight.t(), statistics.hessian, 1).t()
    assert float((shrunk.abs().amax(1) / weight.abs().amax(1)).mean()) < 0.6
    moved = ((shrunk - weight) @ case.x_hat).square().sum() / (weight @ case.x_hat).square().sum()
    assert float(moved) < 0.01
    plain = round_matrix(weight, stored, statistics, GPTQ())
    found = round_matrix(weight, stored, statistics, GPTQ(), shrink=MagR(alpha=0.1))
    assert found.figures.loss < 0.6 * plain.figures.loss
    assert found.figures.rtn_loss == plain.figures.rtn_loss
    assert found.figures.method == f"{GPTQ()} + {MagR(alpha=0.1)}"


@pytest.mark.parametrize("text", ["int3 sym group=16", "int3 asym group=32", "int3 sym channel", "e2m1 group=16"])
def test_clipping_takes_the_best_of_ten(text: str) -> None:
    case, spec = layer(rows=5), QuantSpec.parse(text)
    stored, hessian = Stored.plain(spec, case.weight), case.statistics.hessian
    found = AwqClip().ranges(case.weight.t().contiguous(), hessian, stored, ()).t()
    group = 64 // stored.scales[1]
    for row in range(5):
        for first in range(0, 64, group):
            own = case.weight[row, first : first + group]
            block = hessian[first : first + group, first : first + group]
            tried = []
            for i in range(10):
                limit = float(own.abs().max()) * (1 - i / 20)
                clamped = own.clamp(-limit, limit)
                # A tensor of one group: its rows are alike.
                alone = QuantSpec.parse(text.split(" group")[0].replace(" channel", "") + " channel")
                wrong = alone.quantize(clamped.unsqueeze(0)).dequantize(torch.float64)[0] - own
                tried.append((float(wrong @ block @ wrong), i, clamped))
            best = min(tried, key=lambda one: one[:2])
            assert torch.equal(found[row, first : first + group], best[2])


def test_clipping_helps_and_keeps_the_weights_themselves() -> None:
    case, spec = layer(), QuantSpec.parse("int3 sym channel")
    stored, hessian = Stored.plain(spec, case.weight), case.statistics.hessian
    found = round_matrix(case.weight, stored, case.statistics, GPTQ(), clip=AwqClip())
    ranges = AwqClip().ranges(case.weight.t().contiguous(), hessian, stored, ()).t()
    assert torch.equal(found.result.scale, spec.quantize(ranges).scale)
    assert not torch.equal(found.result.scale, spec.quantize(case.weight).scale)
    nearest = Grid.fit(ranges, stored).round(case.weight.t(), slice(None)).t()
    wrong = ((nearest - case.weight) @ case.x_hat).square().sum() / (case.weight @ case.x_hat).square().sum()
    assert float(wrong) < 0.9 * found.figures.rtn_loss
    # What is rounded is the weight, not what its range was taken from.
    grid, columns = Grid.fit(ranges, stored), case.weight.t().contiguous()
    expected = recurse(columns, columns, factor(hessian, 0.01).feedback, grid)
    assert torch.equal(found.values, expected.t())
    shared = Stored.plain(QuantSpec.parse("int3 sym block=8x16"), case.weight)
    assert round_matrix(case.weight, shared, case.statistics, GPTQ(), clip=AwqClip()).figures.fell_back is None
    with pytest.raises(QCompileError, match="do not go together"):
        round_matrix(case.weight, stored, case.statistics, GPTQ(), groups="running", clip=AwqClip())
