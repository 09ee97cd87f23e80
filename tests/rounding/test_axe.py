"""No input in range makes a bounded layer's accumulator overflow, and the codes are those of the definition."""

from __future__ import annotations

import itertools

import pytest
import torch
from oracles import second_order
from rounding_cases import layer
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.numerics import QuantSpec
from qcompile.rounding import GPFQ, GPTQ, Accumulator, Method, Stored, prove, round_matrix

TIGHT = Accumulator(bits=13, tile=16, input_min=-128, input_max=127)


@pytest.mark.parametrize("accumulator", [TIGHT, Accumulator(14, 32, 0, 255), Accumulator(12, 24, -100, 60)])
@pytest.mark.parametrize("method", [GPTQ(), GPFQ()])
def test_codes_are_those_of_the_loop(method: Method, accumulator: Accumulator) -> None:
    case, spec = layer(rows=8), QuantSpec.parse("int4 sym channel")
    steps = spec.quantize(case.weight).scale.double()[:, 0]
    tile, low, high = accumulator.tile, accumulator.input_min, accumulator.input_max
    budgets = [second_order.Budget(accumulator.bits, tile, low, high) for _ in range(8)]
    codes = case.weight / steps.unsqueeze(1)
    radius = (2**accumulator.bits - 2) / (high - low)

    def softening(row: int, column: int) -> float:
        part = codes[row, column // tile * tile :][:tile]
        centred = (part - part.mean()).tolist()
        clipped = second_order.infinity_prox(centred, radius)
        return max(map(abs, clipped)) if sum(map(abs, centred)) > radius else 0.0

    def rounding(x: Tensor, column: int) -> Tensor:
        found = []
        for row, budget in enumerate(budgets):
            y = float(x[row] / steps[row])
            y = (1 if y > 0 else -1) * max(abs(y) - softening(row, column), 0.0)
            found.append(budget.take(max(-8, min(7, round(y))), column))
        return torch.tensor(found, dtype=torch.float64) * steps

    hessian = case.statistics.hessian
    if isinstance(method, GPTQ):
        expected = second_order.gptq(case.weight, hessian, 0.01, rounding)
    else:
        expected = second_order.gpfq(case.weight, case.x, case.x_hat, rounding)
    stored = Stored.plain(spec, case.weight)
    found = round_matrix(case.weight, stored, case.statistics, method, accumulator=accumulator, safe=False)
    torch.testing.assert_close(found.values, expected, rtol=1e-12, atol=0)
    assert found.proof is not None
    worst = [budget.worst(taken) for budget in budgets for taken in budget.codes.values()]
    assert found.proof.lowest == min(least for least, _ in worst)
    assert found.proof.highest == max(most for _, most in worst)
    assert found.proof.holds
    free = round_matrix(case.weight, stored, case.statistics, method)
    assert not prove(free.result.codes, accumulator).holds
    assert free.figures.loss < found.figures.loss


@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_every_order_and_the_fallback_stay_within_the_bound(order: str) -> None:
    case, spec = layer(), QuantSpec.parse("int4 sym range=signed group=16")
    stored = Stored.plain(spec, case.weight)
    method = GPTQ(order=order)  # type: ignore[arg-type]
    found = round_matrix(case.weight, stored, case.statistics, method, accumulator=TIGHT)
    again = prove(found.result.codes, TIGHT)
    assert again == found.proof
    assert again.holds
    assert again.highest > 0.9 * TIGHT.limit or again.lowest < -0.9 * TIGHT.limit
    nothing = layer()
    nothing.x_hat.zero_()
    kept = round_matrix(case.weight, stored, nothing.statistics, method, accumulator=TIGHT)
    assert kept.figures.fell_back == "no input came in"
    assert prove(kept.result.codes, TIGHT).holds


def test_proofs_count_every_input() -> None:
    codes = torch.tensor([[7, -8, 3, 1, -2], [0, 0, 0, 0, -8]], dtype=torch.int8)
    accumulator = Accumulator(bits=8, tile=3, input_min=-2, input_max=3)
    sums = [
        sum(code * x for code, x in zip(part, inputs, strict=True))
        for row in codes.tolist()
        for part in (row[:3], row[3:])
        for inputs in itertools.product((-2, -1, 0, 1, 2, 3), repeat=len(part))
    ]
    proof = prove(codes, accumulator)
    assert (proof.lowest, proof.highest, proof.tiles, proof.outputs) == (min(sums), max(sums), 2, 2)
    assert proof.holds
    assert proof.limit == 127
    assert not prove(codes, Accumulator(bits=6, tile=3, input_min=-2, input_max=3)).holds
    assert prove(torch.tensor([[200, 5]], dtype=torch.uint8), accumulator).highest == 615


@pytest.mark.parametrize(("text", "accumulator", "reason"), [
    ("int4 asym channel", TIGHT, "needs symmetric integer codes"),
    ("e2m1 channel", TIGHT, "needs symmetric integer codes"),
    ("int4 sym group=16", Accumulator(tile=24), "tiles cross groups of 16"),
])  # fmt: skip
def test_what_cannot_be_bounded(text: str, accumulator: Accumulator, reason: str) -> None:
    case, spec = layer(), QuantSpec.parse(text)
    with pytest.raises(QCompileError, match=reason):
        round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, GPTQ(), accumulator=accumulator)


def test_accumulators_that_make_no_sense() -> None:
    with pytest.raises(QCompileError, match="with 0 in it"):
        Accumulator(input_min=1, input_max=5)
    with pytest.raises(QCompileError, match="2 to 48 bits"):
        Accumulator(bits=1)


@pytest.mark.parametrize("spec", ["int4 sym channel", "int4 sym tensor", "int4 sym group=32"])
def test_wider_scales_cost_less_than_codes_cut_off(spec: str) -> None:
    case = layer(rows=24, columns=64)
    stored = Stored.plain(QuantSpec.parse(spec), case.weight)
    found = {}
    for widen in (False, True):
        bound = Accumulator(bits=12, tile=32, widen=widen)
        rounded = round_matrix(case.weight, stored, case.statistics, GPTQ(order="act"), accumulator=bound)
        assert rounded.proof is not None
        assert rounded.proof.holds
        found[widen] = rounded.figures.loss
    assert found[True] < 0.5 * found[False]
    loose = Accumulator(bits=20, tile=32, widen=True)  # nothing to widen
    same = round_matrix(case.weight, stored, case.statistics, GPTQ(order="act"), accumulator=loose).result
    assert torch.equal(same.codes, round_matrix(case.weight, stored, case.statistics, GPTQ(order="act")).result.codes)
