"""H + λI = R Rᵀ with R upper triangular, and the feedback that it holds. No inverse is formed.

For an error E = W - Q (rows of one output each), tr(E H Eᵀ) = ‖E R‖². Column j of E R is R_jj (E_j + Σ_{k<j} E_k
R_kj / R_jj), so once columns k < j are rounded, the best value for column j is w_j + Σ_{k<j} M_jk (w_k - q_k) with
M_jk = R_kj / R_jj: the strictly lower triangle of (R diag(R)⁻¹)ᵀ. That is GPTQ (arXiv 2210.17323) in the form of
arXiv 2507.18553, and H + λI = (I + M)ᵀ diag(R)² (I + M).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.linalg import cholesky, solve_lower, solve_upper
from qcompile.rounding.order import ordered

LEAST_RAISE = 1e-6
"""A failed factorisation is tried again with at least this damping, then ten times as much each time."""
MOST_DAMPING = 1.0


@dataclass(frozen=True, eq=False)
class Factored:
    """`feedback` M [n, n], of which only what is below the diagonal counts; `pivots` diag(R)² [n]; `dead` [n]: columns
    with H_jj = 0.

    `damping` is the one that worked, `tried` all of them in order, both in multiples of the mean live diagonal.
    """

    feedback: Tensor
    pivots: Tensor
    dead: Tensor
    ridge: float
    damping: float
    tried: tuple[float, ...]

    def solve(self, right: Tensor) -> Tensor:
        """(H + λI)⁻¹ `right`, for `right` [n, m]."""
        inner = solve_upper(self.feedback.t(), right, unit=True)
        return solve_lower(self.feedback, inner.div_(self.pivots.unsqueeze(1)), unit=True)


@dataclass(frozen=True, eq=False)
class Factors:
    """What was factored of one Hessian, for all matrices that read the same inputs; by order, damping and unit."""

    found: dict[tuple[bytes, torch.dtype, float, float | None], Factored] = field(default_factory=dict)

    def of(self, hessian: Tensor, damping: float, unit: float | None, order: Tensor | None) -> Factored:
        """`factor(hessian, damping, unit, order)`, computed once."""
        turns = b"" if order is None else order.cpu().numpy().tobytes()
        key = turns, hessian.dtype, damping, unit
        if key not in self.found:
            self.found[key] = factor(hessian, damping, unit, order)
        return self.found[key]


def factor(hessian: Tensor, damping: float, unit: float | None = None, order: Tensor | None = None) -> Factored:
    """Factor `hessian` [n, n] (float32 or float64, symmetric) + damping × `unit` × I, with its columns in `order` [n].

    `unit`: the mean of the diagonal over live columns where None. A dead column (nothing came in: H_jj = 0) counts as
    one of H_jj = 1 that is tied to no other. Where the factorisation fails, damping is raised to 1e-6 or ten times
    what it was, up to 1; QCompileError where none works, or where `hessian` holds nan or infinity.
    """
    if damping < 0:
        raise QCompileError(f"damping={damping} is negative; use 0 or more, 0.01 as a rule")
    diagonal = hessian.diagonal() if order is None else hessian.diagonal()[order]
    if not bool(torch.isfinite(hessian.sum())):
        raise QCompileError(f"the Hessian (shape {list(hessian.shape)}) holds nan or infinity; find the layer's inputs")
    dead = diagonal == 0
    mean = float(diagonal.sum(dtype=torch.float64)) / max(1, int((~dead).sum()))
    unit = (mean or 1.0) if unit is None else unit
    plain = (diagonal + dead).flip(0)
    tried: list[float] = []
    while damping <= MOST_DAMPING:
        tried.append(damping)
        flipped = hessian.flip(0, 1) if order is None else ordered(hessian, order.flip(0))
        torch.add(plain, damping * unit, out=flipped.diagonal())
        upper, well = cholesky(flipped)
        if well and bool(torch.isfinite(upper.diagonal()).all()):
            return _factored(upper, dead, damping, damping * unit, tuple(tried))
        damping = max(LEAST_RAISE, 10 * damping)
    steps = ", ".join(f"{d:g}" for d in tried)
    raise QCompileError(f"the Hessian has no factorisation with damping {steps}; use more calibration data")


def _factored(upper: Tensor, dead: Tensor, damping: float, ridge: float, tried: tuple[float, ...]) -> Factored:
    diagonal = upper.diagonal().clone()
    feedback = upper.div_(diagonal.unsqueeze(1)).flip(0, 1)
    return Factored(feedback, diagonal.square().flip(0), dead, ridge, damping, tried)
