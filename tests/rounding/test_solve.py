"""What is reported is what happened, counted from the data."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from rounding_cases import Layer, layer
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.numerics import QuantSpec
from qcompile.rounding import GPTQ, FloatTarget, Rounded, Statistics, Stored, Sums, round_matrix
from qcompile.rounding.method import Problem

SPEC = QuantSpec.parse("int3 sym group=16")


def rounded(case: Layer, method: object, **changes: object) -> Rounded:
    statistics = dataclasses.replace(case.statistics, **changes)  # type: ignore[arg-type]
    return round_matrix(case.weight, Stored.plain(SPEC, case.weight), statistics, method)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_figures_are_counted_from_the_data(dtype: torch.dtype) -> None:
    case = layer(rows=300, columns=320, tokens=500, dtype=dtype)
    for method in (GPTQ(order="act"), FloatTarget(order="act")):
        found = rounded(case, method)
        exact = layer(rows=300, columns=320, tokens=500)
        nearest = SPEC.quantize(case.weight).dequantize(dtype)
        figures = found.figures
        assert figures.fell_back is None
        for values, loss, gap, error in (
            (found.values, figures.loss, figures.gap, figures.error),
            (nearest, figures.rtn_loss, figures.rtn_gap, figures.rtn_error),
        ):
            w, q = exact.weight, values.double()
            energy = (w @ exact.x_hat).square().sum()
            assert loss == pytest.approx(float(((w - q) @ exact.x_hat).square().sum() / energy), rel=1e-4)
            wrong = (w @ exact.x - q @ exact.x_hat).square().sum()
            unrounded = (w @ exact.x - w @ exact.x_hat).square().sum()
            assert gap == pytest.approx(float((wrong - unrounded) / energy), rel=1e-4)
            assert error == pytest.approx(float(wrong / (w @ exact.x).square().sum()), rel=1e-3)
        assert figures.method == str(method)
        assert (figures.tokens, figures.dead, figures.damping, figures.tried) == (500, 0, 0.01, (0.01,))
        assert found.values.dtype == dtype
        assert torch.equal(found.result.dequantize(dtype), found.values)


def test_gptq_beats_nearest_and_the_float_target_beats_gptq_where_it_counts() -> None:
    case = layer()
    plain, target = rounded(case, GPTQ()).figures, rounded(case, FloatTarget()).figures
    assert plain.loss < 0.7 * plain.rtn_loss
    assert target.error is not None
    assert plain.error is not None
    assert target.error < plain.error < (plain.rtn_error or 0)
    assert plain.loss < target.loss


@dataclasses.dataclass(frozen=True)
class Worse:
    """Rounds twice the weight."""

    follows_float = False
    order = "none"

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        return Problem(2 * columns, columns, torch.zeros_like(sums.hessian), None)


def test_a_worse_result_is_dropped_and_said() -> None:
    case = layer()
    nearest = SPEC.quantize(case.weight)
    found = rounded(case, Worse())
    assert found.figures.fell_back is not None
    assert "above" in found.figures.fell_back
    assert torch.equal(found.result.codes, nearest.codes)
    assert torch.equal(found.values, nearest.dequantize(torch.float64))
    assert found.figures.loss == found.figures.rtn_loss
    assert found.figures.damping is None
    kept = round_matrix(case.weight, Stored.plain(SPEC, case.weight), case.statistics, Worse(), safe=False)  # type: ignore[arg-type]
    assert kept.figures.fell_back is None
    assert kept.figures.loss > kept.figures.rtn_loss


def test_a_layer_that_saw_nothing_is_rounded_to_nearest() -> None:
    case = layer()
    zeros = torch.zeros(64, 64, dtype=torch.float64)
    found = rounded(case, FloatTarget(), hessian=zeros, cross=zeros, tokens=0, power=torch.zeros(24))
    assert found.figures.fell_back == "no input came in"
    assert torch.equal(found.result.codes, SPEC.quantize(case.weight).codes)
    assert (found.figures.dead, found.figures.loss, found.figures.error) == (64, 0.0, None)


def test_dead_columns_become_zero_and_do_not_widen_the_grid() -> None:
    case = layer()
    case.x_hat[[3, 40]] = 0
    case.weight[:, 3] = 100
    found = rounded(case, GPTQ(), cross=None)
    assert not found.values[:, [3, 40]].any()
    assert float(found.result.scale.abs().max()) < 2
    assert found.figures.dead == 2
    assert found.figures.gap is None


def test_what_does_not_fit() -> None:
    case = layer()
    with pytest.raises(QCompileError, match=r"FloatTarget.* needs cross"):
        rounded(case, FloatTarget(), cross=None)
    with pytest.raises(QCompileError, match=r"cross of shape \[3, 3\] for 64 inputs"):
        rounded(case, GPTQ(), cross=torch.eye(3))
    with pytest.raises(QCompileError, match="transpose it"):
        round_matrix(case.weight.t(), Stored.plain(SPEC, case.weight), Statistics(torch.eye(64)), GPTQ())
    with pytest.raises(QCompileError, match="keeps groups together"):
        round_matrix(case.weight, Stored.plain(SPEC, case.weight), case.statistics, GPTQ(order="act"), groups="running")


def test_methods_print_as_the_calls_that_make_them() -> None:
    assert str(GPTQ(order="act")) == "GPTQ(damping=0.01, order='act')"
    assert eval(str(FloatTarget(0.1, toward="zero"))) == FloatTarget(0.1, toward="zero")
