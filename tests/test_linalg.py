"""Products, factors and solutions in float32 beside the same in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile import linalg

TOLERANCE = 3e-6  # of the largest entry: float32 sums over up to 700 terms


def _random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))


def _off(found: Tensor, exact: Tensor) -> float:
    return float((found.double() - exact).abs().max() / exact.abs().max())


LAYOUTS = {
    "rows": lambda m: m,
    "columns": lambda m: m.t().contiguous().t(),
    "part of a larger one": lambda m: torch.nn.functional.pad(m, (3, 5, 1, 2))[1:-2, 3:-5],
}


@pytest.mark.parametrize("left", LAYOUTS)
@pytest.mark.parametrize("right", LAYOUTS)
@pytest.mark.parametrize("sizes", [(130, 300, 257), (64, 64, 700), (3, 200, 100)], ids=str)
def test_product(left: str, right: str, sizes: tuple[int, int, int]) -> None:
    n, k, m = sizes
    a, b = _random(n, k), _random(k, m)
    found = linalg.product(LAYOUTS[left](a), LAYOUTS[right](b))
    assert _off(found, a.double() @ b.double()) < TOLERANCE


@pytest.mark.parametrize("shape", [(300,), (130, 300), (5, 40, 300), (2, 0, 300)], ids=str)
@pytest.mark.parametrize("biased", [False, True])
def test_linear(shape: tuple[int, ...], biased: bool) -> None:
    x, weight, bias = _random(*shape), _random(257, 300), _random(257) if biased else None
    found = linalg.linear(x, weight, bias)
    exact = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    assert found.shape == exact.shape
    assert not found.numel() or _off(found, exact) < TOLERANCE


def test_what_is_not_float32_is_what_torch_computes() -> None:
    a, b = _random(200, 300).double(), _random(300, 200).double()
    assert torch.equal(linalg.product(a, b), a @ b)
    half = a.bfloat16()
    assert torch.equal(linalg.linear(half, half), torch.nn.functional.linear(half, half))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("size", [5, 300, 700])
def test_cholesky(size: int, dtype: torch.dtype) -> None:
    rows = _random(2 * size, size).to(dtype)
    matrix = rows.t() @ rows / size
    upper, well = linalg.cholesky(matrix.clone())
    upper = upper.triu().double()
    assert well
    tolerance = TOLERANCE if dtype == torch.float32 else 1e-13
    assert _off(upper.t() @ upper, matrix.double()) < tolerance


@pytest.mark.parametrize("where", [3, 400, 690])
def test_a_matrix_that_has_no_factor(where: int) -> None:
    matrix = torch.eye(700)
    matrix[where, where] = -1.0
    assert not linalg.cholesky(matrix)[1]


@pytest.mark.parametrize("unit", [False, True])
@pytest.mark.parametrize("size", [5, 700])
def test_triangular_solutions(size: int, unit: bool) -> None:
    square = _random(size, size) / size + 2 * torch.eye(size)  # what is on the other side of the diagonal is not read
    right = _random(size, 130)
    lower, upper = square.double().tril(), square.double().triu()
    if unit:
        lower, upper = (t - torch.diag(t.diagonal()) + torch.eye(size) for t in (lower, upper))
    assert _off(lower @ linalg.solve_lower(square, right, unit).double(), right.double()) < TOLERANCE
    assert _off(upper @ linalg.solve_upper(square, right, unit).double(), right.double()) < TOLERANCE
