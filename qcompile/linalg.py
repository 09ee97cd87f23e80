"""Large float32 products on the CPU, and factorisations made of them.

torch hands float32 products to a BLAS that was built for one maker's processors and runs at half speed on others'.
oneDNN, which torch carries as well, runs at full speed on all that have AVX-512 (measured on an AMD EPYC, one core,
2048³: 107 and 226 GFLOP/s). Its sums run in one chain: errors are up to three times those of the BLAS, a few float32
units. What is not float32, not on a CPU of that kind, or small, goes where torch sends it.
"""

from __future__ import annotations

import math
from functools import cache

import torch
from torch import Tensor

SMALLEST = 64
"""Products with a side below this stay with torch: a call of oneDNN costs some 10 µs more."""
BLOCK = 128
"""Triangular matrices are halved down to this size; what is left is LAPACK's."""


@cache
def available() -> bool:
    """Whether oneDNN is there and this processor has AVX-512."""
    there = bool(torch.backends.mkldnn.is_available())  # type: ignore[no-untyped-call]
    return there and torch.backends.cpu.get_cpu_capability().startswith("AVX512")


def product(left: Tensor, right: Tensor) -> Tensor:
    """``left [n, k] @ right [k, m]``, both of one dtype, in any layout."""
    if not _large(left, right.t()):
        return left @ right
    return _onednn(left.contiguous(), _dense(right.t()), None)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x [..., k] @ weight [m, k]ᵀ + bias [m]``, as `torch.nn.functional.linear`."""
    if not _large(x.reshape(-1, x.shape[-1]), weight) or (bias is not None and bias.dtype != torch.float32):
        return torch.nn.functional.linear(x, weight, bias)
    return _onednn(x.contiguous(), _dense(weight), bias)


def cholesky(matrix: Tensor) -> tuple[Tensor, bool]:
    """The upper triangular U with Uᵀ U = `matrix` [n, n] (symmetric, overwritten by it), and whether there is one.

    What stands below the diagonal of U is of no meaning.
    """
    size = len(matrix)
    if size <= BLOCK or not _large(matrix, matrix):
        upper, info = torch.linalg.cholesky_ex(matrix, upper=True)
        matrix.copy_(upper)
        return matrix, int(info) == 0
    middle = size // 2
    first, well = cholesky(matrix[:middle, :middle])
    if not well:
        return matrix, False
    beside = solve_lower(first.t(), matrix[:middle, middle:])
    matrix[:middle, middle:] = beside
    _subtract_gram(matrix[middle:, middle:], beside)
    return matrix, cholesky(matrix[middle:, middle:])[1]


def solve_lower(lower: Tensor, right: Tensor, unit: bool = False) -> Tensor:
    """X [n, m] with L X = `right`, of L [n, n] only the lower triangle read; `unit`: its diagonal counts as ones."""
    size = len(lower)
    if size <= BLOCK or not _large(lower, right.t()):
        return _solved(lower, right, False, unit)
    middle = size // 2
    first = solve_lower(lower[:middle, :middle], right[:middle], unit)
    rest = right[middle:] - product(lower[middle:, :middle], first)
    return torch.cat([first, solve_lower(lower[middle:, middle:], rest, unit)])


def solve_upper(upper: Tensor, right: Tensor, unit: bool = False) -> Tensor:
    """X [n, m] with U X = `right`, of U [n, n] only the upper triangle read; `unit`: its diagonal counts as ones."""
    size = len(upper)
    if size <= BLOCK or not _large(upper, right.t()):
        return _solved(upper, right, True, unit)
    middle = size // 2
    last = solve_upper(upper[middle:, middle:], right[middle:], unit)
    rest = right[:middle] - product(upper[:middle, middle:], last)
    return torch.cat([solve_upper(upper[:middle, :middle], rest, unit), last])


def _solved(matrix: Tensor, right: Tensor, upper: bool, unit: bool) -> Tensor:
    """LAPACK's, on what is turned over: it takes columns that lie side by side, and rows would be copied twice."""
    turned = torch.linalg.solve_triangular(matrix.t(), right.t(), upper=not upper, left=False, unitriangular=unit)
    found: Tensor = turned.t()
    return found


def _subtract_gram(matrix: Tensor, rows: Tensor) -> None:
    """``matrix [n, n] -= rowsᵀ rows [k, n]``, the upper triangle alone, in strips."""
    turned = rows.t().contiguous()
    for low in range(0, len(matrix), BLOCK):
        high = min(low + BLOCK, len(matrix))
        matrix[low:high, low:] -= product(turned[low:high], turned[low:].t())


def _large(left: Tensor, right: Tensor) -> bool:
    """Whether ``left [n, k] @ right [m, k]ᵀ`` is one for oneDNN."""
    return (
        left.dtype == right.dtype == torch.float32
        and left.device.type == right.device.type == "cpu"
        and min(*left.shape, *right.shape) >= SMALLEST
        and math.prod(left.shape) * len(right) >= 128**3
        and available()
    )


def _dense(matrix: Tensor) -> Tensor:
    """A matrix whose rows or columns lie side by side; part of a larger one, which oneDNN crawls through, is copied."""
    return matrix if matrix.is_contiguous() or matrix.t().is_contiguous() else matrix.contiguous()


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    found: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return found
