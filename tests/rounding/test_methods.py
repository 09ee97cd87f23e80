"""Methods that know the float stream give the codes of the papers' loops on the data."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from oracles import second_order
from rounding_cases import layer, plain

from qcompile.errors import QCompileError
from qcompile.numerics import QuantSpec
from qcompile.rounding import GPFQ, GPTAQ, GPTQ, FloatTarget, Method, Qronos, Stored, bias_correction, round_matrix

FORMATS = ["int3 asym group=16", "int4 sym range=signed observer=mse", "mxfp4(even)", "nvfp4"]


@pytest.mark.parametrize("text", FORMATS)
@pytest.mark.parametrize("alpha", [0.25, 1.0])
def test_gptaq(text: str, alpha: float) -> None:
    case, spec = layer(), QuantSpec.parse(text)
    expected = second_order.gptaq(case.weight, case.x, case.x_hat, 0.01, alpha, plain(case.weight, spec))
    method = GPTAQ(alpha=alpha)
    found = round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, method, safe=False)
    assert torch.equal(found.values, expected)


@pytest.mark.parametrize("text", FORMATS)
def test_gpfq(text: str) -> None:
    case, spec = layer(), QuantSpec.parse(text)
    stored = Stored.plain(spec, case.weight)
    expected = second_order.gpfq(case.weight, case.x, case.x_hat, plain(case.weight, spec))
    found = round_matrix(case.weight, stored, case.statistics, GPFQ(), safe=False)
    assert torch.equal(found.values, expected)
    assert (found.figures.damping, found.figures.tried) == (None, ())
    expected = second_order.gpfq(case.weight, case.x_hat, case.x_hat, plain(case.weight, spec))
    alone = dataclasses.replace(case.statistics, cross=None)
    found = round_matrix(case.weight, stored, alone, GPFQ(), safe=False)
    assert torch.equal(found.values, expected)


@pytest.mark.parametrize("text", FORMATS)
def test_qronos(text: str) -> None:
    case, spec = layer(rows=6, tokens=150), QuantSpec.parse(text)
    ridge = 0.01 * float(torch.linalg.eigvalsh(case.x_hat @ case.x_hat.t())[-1])
    expected = second_order.qronos(case.weight, case.x, case.x_hat, ridge, plain(case.weight, spec))
    stored = Stored.plain(spec, case.weight)
    found = round_matrix(case.weight, stored, case.statistics, Qronos(alpha=0.01), safe=False)
    assert torch.equal(found.values, expected)
    target = round_matrix(case.weight, stored, case.statistics, FloatTarget(), safe=False)
    assert not torch.equal(found.values, target.values)


@pytest.mark.parametrize("method", [GPTAQ(), GPFQ(), Qronos(), FloatTarget(), GPTQ()])
@pytest.mark.parametrize("order", ["act", "group"])
def test_orders_and_dead_inputs_suit_every_method(method: Method, order: str) -> None:
    case, spec = layer(), QuantSpec.parse("int3 asym group=16")
    case.x_hat[[0, 20]] = 0
    ordered = dataclasses.replace(method, order=order)  # type: ignore[type-var]
    found = round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, ordered)
    assert found.figures.fell_back is None
    assert not found.values[:, [0, 20]].any()
    assert found.figures.error is not None
    assert found.figures.error < (found.figures.rtn_error or 0)
    assert bool(torch.isfinite(found.values).all())


@pytest.mark.parametrize("method", [GPTAQ(), Qronos()])
def test_the_float_stream_is_asked_for(method: Method) -> None:
    case = layer()
    spec = QuantSpec.parse("int3 sym group=16")
    statistics = dataclasses.replace(case.statistics, cross=None)
    with pytest.raises(QCompileError, match="needs cross"):
        round_matrix(case.weight, Stored.plain(spec, case.weight), statistics, method)


def test_bias_correction_evens_out_the_means() -> None:
    case, spec = layer(), QuantSpec.parse("int2 sym group=16")
    values = round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, GPTQ()).values
    moved = bias_correction(case.weight, values, case.statistics)
    outputs = values @ case.x_hat + moved.unsqueeze(1)
    torch.testing.assert_close(outputs.mean(1), (case.weight @ case.x).mean(1))
    alone = dataclasses.replace(case.statistics, mean_float=None)
    moved = bias_correction(case.weight, values, alone)
    outputs = values @ case.x_hat + moved.unsqueeze(1)
    torch.testing.assert_close(outputs.mean(1), (case.weight @ case.x_hat).mean(1))
    with pytest.raises(QCompileError, match="was not collected"):
        bias_correction(case.weight, values, dataclasses.replace(case.statistics, mean=None))
