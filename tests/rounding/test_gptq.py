"""The recursion gives the codes of the papers' loops."""

from __future__ import annotations

import pytest
import torch
from oracles import second_order
from rounding_cases import by_tensor, layer, plain
from torch import Tensor

from qcompile.numerics import QParams, QuantSpec, choose_qparams
from qcompile.rounding import GPTQ, FloatTarget, Statistics, Stored, factor, recurse, round_matrix
from qcompile.rounding.grid import Grid

FORMATS = ["int4 sym group=32", "int3 asym group=16", "int2 asym group=32 zero=float", "int4 sym range=signed observer=mse",
           "mxfp4(even)", "nvfp4", "nf4 group=32 double=8x16", "mx6"]  # fmt: skip


@pytest.mark.parametrize("text", FORMATS)
def test_gptq_is_the_published_loop(text: str) -> None:
    case, spec = layer(), QuantSpec.parse(text)
    x_hat = case.x_hat.clone()
    x_hat[[7, 33]] = 0
    hessian = x_hat @ x_hat.t()
    living = case.weight.clone()
    living[:, [7, 33]] = 0
    expected = second_order.gptq(case.weight, hessian, 0.01, plain(living, spec), block=24)
    found = round_matrix(case.weight, Stored.plain(spec, living), Statistics(hessian), GPTQ(), safe=False)
    assert torch.equal(found.values, expected)
    assert torch.equal(found.result.dequantize(torch.float64), expected)
    assert found.figures.dead == 2


@pytest.mark.parametrize("leaf", [1, 2, 5, 16, 64, 100])
def test_halving_changes_no_code(leaf: int) -> None:
    case, spec = layer(), QuantSpec.parse("int3 sym group=32")
    grid = Grid.fit(case.weight, Stored.plain(spec, case.weight))
    columns, feedback = case.weight.t().contiguous(), factor(case.statistics.hessian, 0.01).feedback
    found = recurse(columns, columns, feedback, grid, leaf)
    assert torch.equal(found, recurse(columns, columns, feedback, grid, 1))
    assert torch.equal(columns, case.weight.t())  # what was given stays


@pytest.mark.parametrize(("text", "group"), [("int3 asym group=16", 16), ("int4 sym group=32", 32), ("mxfp4(even)", 32),
                                             ("nvfp4", 16), ("int4 sym group=8 scale=f16", 8)])  # fmt: skip
@pytest.mark.parametrize("order", ["none", "group"])
def test_running_groups_are_chosen_from_the_updated_columns(text: str, group: int, order: str) -> None:
    case, spec = layer(), QuantSpec.parse(text)
    outer = choose_qparams(case.weight, spec).outer
    hessian = case.statistics.hessian
    turns = torch.arange(64)
    if order == "group":
        turns = torch.tensor(gar(hessian.diagonal().tolist(), group))
    chosen: dict[int, QParams] = {}

    def opening(first: int, columns: Tensor) -> None:
        assert columns.shape == (24, group)
        chosen[first] = choose_qparams(columns.contiguous(), spec, outer)

    def rounding(x: Tensor, column: int) -> Tensor:
        params = chosen[column // group * group]
        return by_tensor(spec, params, (24, group))(x, column % group)

    moved = second_order.gptq(
        case.weight[:, turns], hessian[turns][:, turns], 0.05, rounding, block=48, group=group, opening=opening
    )
    expected = torch.empty_like(moved)
    expected[:, turns] = moved
    method = GPTQ(damping=0.05, order="group" if order == "group" else "none")
    stored = Stored.plain(spec, case.weight)
    found = round_matrix(case.weight, stored, Statistics(hessian), method, groups="running", safe=False)
    assert torch.equal(found.values, expected)
    assert torch.equal(found.result.dequantize(torch.float64), expected)


def gar(diagonal: list[float], group: int) -> list[int]:
    """Groups by their largest entry, columns by theirs within; plain Python."""
    groups = [list(range(first, first + group)) for first in range(0, len(diagonal), group)]
    groups.sort(key=lambda columns: -max(diagonal[j] for j in columns))
    return [j for columns in groups for j in sorted(columns, key=lambda j: -diagonal[j])]


@pytest.mark.parametrize("order", ["act", "group"])
def test_orders_are_those_of_a_permuted_problem(order: str) -> None:
    case, spec = layer(), QuantSpec.parse("int3 sym group=16")
    hessian = case.statistics.hessian
    diagonal = hessian.diagonal().tolist()
    turns = gar(diagonal, 16) if order == "group" else sorted(range(64), key=lambda j: -diagonal[j])
    static = plain(case.weight, spec)
    moved = second_order.gptq(
        case.weight[:, turns], hessian[turns][:, turns], 0.01, lambda x, column: static(x, turns[column])
    )
    method = GPTQ(order="act" if order == "act" else "group")
    found = round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, method, safe=False)
    assert torch.equal(found.values[:, turns], moved)
    unordered = round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, GPTQ(), safe=False)
    assert found.figures.loss < unordered.figures.loss


@pytest.mark.parametrize("toward", ["weight", "zero"])
@pytest.mark.parametrize("text", ["int3 asym group=16", "mxfp4(even)"])
def test_the_float_target_is_least_squares_column_by_column(text: str, toward: str) -> None:
    case, spec = layer(rows=6, tokens=40), QuantSpec.parse(text)
    ridge = 0.02 * float((case.x_hat @ case.x_hat.t()).diagonal().mean())
    extra = ridge**0.5 * torch.eye(64, dtype=torch.float64)
    drawn = case.weight @ extra if toward == "weight" else torch.zeros_like(case.weight)
    goal = torch.cat([case.weight @ case.x, drawn], dim=1)
    inputs = torch.cat([case.x_hat, extra], dim=1)
    expected = second_order.conditional_rounding(goal, inputs, plain(case.weight, spec))
    method = FloatTarget(damping=0.02, toward="weight" if toward == "weight" else "zero")
    found = round_matrix(case.weight, Stored.plain(spec, case.weight), case.statistics, method, safe=False)
    assert torch.equal(found.values, expected)


def test_the_same_streams_make_the_float_target_plain_gptq() -> None:
    case, spec = layer(), QuantSpec.parse("int3 sym group=16")
    h = case.statistics.hessian
    stored = Stored.plain(spec, case.weight)
    both = [round_matrix(case.weight, stored, Statistics(h, h), m, safe=False) for m in (FloatTarget(), GPTQ())]
    assert torch.equal(both[0].values, both[1].values)
