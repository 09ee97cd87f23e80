"""H + λI is factored as said, or the damping that it took is."""

from __future__ import annotations

import pytest
import torch
from rounding_cases import layer
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.rounding import factor


def rebuilt(feedback: Tensor, pivots: Tensor) -> Tensor:
    unit = feedback.tril(-1) + torch.eye(len(pivots), dtype=feedback.dtype)
    return unit.t() @ pivots.diag() @ unit


def test_the_parts_make_the_whole() -> None:
    hessian = layer().statistics.hessian
    found = factor(hessian, 0.01)
    ridge = 0.01 * float(hessian.diagonal().mean())
    damped = hessian + ridge * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(found.feedback, found.pivots), damped)
    assert found.ridge == pytest.approx(ridge)
    assert (found.damping, found.tried) == (0.01, (0.01,))
    right = torch.randn(64, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    torch.testing.assert_close(damped @ found.solve(right), right)


def test_dead_columns_are_tied_to_no_other() -> None:
    x = layer().x_hat.clone()
    x[[3, 40]] = 0
    found = factor(x @ x.t(), 0.01)
    assert found.dead.nonzero().flatten().tolist() == [3, 40]
    assert not found.feedback.tril(-1)[[3, 40]].any()
    assert not found.feedback.tril(-1)[:, [3, 40]].any()
    live = (x @ x.t()).diagonal()[~found.dead].mean()
    assert found.ridge == pytest.approx(0.01 * float(live))
    undamped = factor(x @ x.t(), 0)
    assert undamped.tried == (0,)
    assert undamped.pivots[[3, 40]].tolist() == [1, 1]


def test_damping_is_raised_until_it_works_and_said() -> None:
    x = layer(tokens=20).x_hat
    hessian = x @ x.t() - 2e-4 * (x @ x.t()).diagonal().mean() * torch.eye(64, dtype=torch.float64)
    found = factor(hessian, 0)
    assert found.tried == pytest.approx((0, 1e-6, 1e-5, 1e-4, 1e-3))
    assert found.damping == found.tried[-1]
    damped = hessian + found.ridge * torch.eye(64, dtype=torch.float64)
    torch.testing.assert_close(rebuilt(found.feedback, found.pivots), damped)


@pytest.mark.parametrize(("change", "damping", "message"), [
    (-3.0, 0.01, "no factorisation with damping 0.01, 0.1, 1"),
    (float("nan"), 0.01, "holds nan"),
    (0.0, -1.0, "negative"),
])  # fmt: skip
def test_what_cannot_be_factored(change: float, damping: float, message: str) -> None:
    hessian = layer().statistics.hessian
    hessian[5, 5] += change * hessian.diagonal().sum()
    with pytest.raises(QCompileError, match=message):
        factor(hessian, damping)
