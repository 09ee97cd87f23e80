"""Factorisations that matrices share: the same codes as without, whatever the order and the damping of each."""

from __future__ import annotations

import pytest
import torch
from rounding_cases import layer

from qcompile.numerics import QuantSpec
from qcompile.rounding import GPTAQ, GPTQ, Factors, FloatTarget, Method, Qronos, Stored, round_matrix


@pytest.mark.parametrize("order", ["none", "act", "group"])
def test_sharing_changes_nothing(order: str) -> None:
    case, factors = layer(), Factors()
    methods: list[Method] = [GPTQ(0.01, order), GPTAQ(0.01, order), FloatTarget(0.1, order), Qronos(order)]  # type: ignore[arg-type]
    for spec in (QuantSpec.parse(f"int3 sym group={size}") for size in (8, 32)):
        for method in methods:
            stored = Stored.plain(spec, case.weight)
            alone = round_matrix(case.weight, stored, case.statistics, method)
            shared = round_matrix(case.weight, stored, case.statistics, method, factors=factors)
            assert torch.equal(alone.result.codes, shared.result.codes)
    orders = 2 if order == "group" else 1  # groups of 8 and of 32 stand in another order
    assert len(factors.found) == 3 * orders
