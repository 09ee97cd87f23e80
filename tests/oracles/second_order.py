"""Second-order rounding from the papers, one column at a time, in float64: slow, and without shared code.

Matrices are as the papers have them: W [out, in], inputs X (float stream) and X̂ (quantized stream) [in, tokens]. `Round`
maps the values [out] of a column to what they decode to; for running groups a method tells `Open` what columns
first … first + size - 1 hold when the first of them is about to be rounded.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Round = Callable[[Tensor, int], Tensor]
Open = Callable[[int, Tensor], None]


def gptq(
    weight: Tensor,
    hessian: Tensor,
    damping: float,
    rounding: Round,
    block: int = 128,
    group: int = 0,
    opening: Open | None = None,
) -> Tensor:
    """Frantar et al., arXiv 2210.17323, algorithm 1: the inverse's Cholesky factor, errors spread to the right.

    Inside a block of columns each error is spread at once, beyond it when the block ends.
    """
    w, h = weight.clone(), hessian.clone()
    dead = h.diagonal() == 0
    mean = h.diagonal()[~dead].mean()
    h.diagonal()[dead] = 1
    w[:, dead] = 0
    h.diagonal().add_(damping * mean)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    count = w.shape[1]
    values = torch.zeros_like(w)
    for start in range(0, count, block):
        stop = min(start + block, count)
        errors = torch.zeros(len(w), stop - start, dtype=w.dtype)
        for j in range(start, stop):
            if opening is not None and j % group == 0:
                # The paper's groups of 128 are its blocks; in general, what the block still owes is paid here.
                ahead = w[:, j : j + group].clone()
                if j + group > stop:
                    ahead[:, stop - j :] -= errors[:, : j - start] @ upper[start:j, stop : j + group]
                opening(j, ahead)
            values[:, j] = rounding(w[:, j], j)
            error = (w[:, j] - values[:, j]) / upper[j, j]
            w[:, j:stop] -= error.unsqueeze(1) * upper[j, j:stop].unsqueeze(0)
            errors[:, j - start] = error
        w[:, stop:] -= errors @ upper[start:stop, stop:]
    return values


def conditional_rounding(goal: Tensor, inputs: Tensor, rounding: Round) -> Tensor:
    """Round A [out, in] so that A inputs stays close to `goal` [out, tokens], by the definition: before each column is
    rounded, it and all later ones are moved to the least-squares optimum that the rounded ones leave.

    With goal = W X̂ this is GPTQ; with goal = W X the float target; damping is one more token √λ for each input.
    """
    values = torch.zeros(len(goal), len(inputs), dtype=goal.dtype)
    for j in range(len(inputs)):
        owed = goal - values[:, :j] @ inputs[:j]
        rest = torch.linalg.lstsq(inputs[j:].t(), owed.t()).solution.t()
        values[:, j] = rounding(rest[:, 0], j)
    return values


def gptaq(weight: Tensor, x: Tensor, x_hat: Tensor, damping: float, alpha: float, rounding: Round) -> Tensor:
    """Li et al., arXiv 2504.02692, algorithm 1 with one block: GPTQ's update, and P of the same inverse factor."""
    w, h = weight.clone(), x_hat @ x_hat.t()
    h.diagonal().add_(damping * h.diagonal().mean())
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    p = alpha * torch.triu((x - x_hat) @ x_hat.t() @ upper.t(), 1) @ upper
    values = torch.zeros_like(w)
    for j in range(w.shape[1]):
        current = w[:, j].clone()
        values[:, j] = rounding(current, j)
        error = (current - values[:, j]) / upper[j, j]
        w[:, j:] += torch.outer(current, p[j, j:]) - torch.outer(error, upper[j, j:])
    return values


def gpfq(weight: Tensor, x: Tensor, x_hat: Tensor, rounding: Round) -> Tensor:
    """Zhang, Zhou and Saab, arXiv 2201.11113, on the data: u is what the columns so far owe to the output."""
    owed = torch.zeros(len(weight), x.shape[1], dtype=weight.dtype)
    values = torch.zeros_like(weight)
    for t in range(weight.shape[1]):
        owed += torch.outer(weight[:, t], x[t])
        values[:, t] = rounding(owed @ x_hat[t] / x_hat[t].square().sum(), t)
        owed -= torch.outer(values[:, t], x_hat[t])
    return values


def qronos(weight: Tensor, x: Tensor, x_hat: Tensor, ridge: float, rounding: Round) -> Tensor:
    """Zhang et al., arXiv 2505.11695, algorithm 1, on the data: correct, round, move the rest to their optimum.

    The optimum is damped: one more token √ridge for each input, in both streams. The first correction is not.
    """
    count = weight.shape[1]
    extra = ridge**0.5 * torch.eye(count, dtype=weight.dtype)
    goal, wide = weight @ torch.cat([x, extra], dim=1), torch.cat([x_hat, extra], dim=1)
    current, values = weight.clone(), torch.zeros_like(weight)
    for t in range(count):
        target, inputs = (weight @ x, x_hat) if t == 0 else (goal, wide)
        others = values[:, :t] @ inputs[:t] + current[:, t + 1 :] @ inputs[t + 1 :]
        values[:, t] = rounding((target - others) @ inputs[t] / inputs[t].square().sum(), t)
        if t + 1 < count:
            owed = goal - values[:, : t + 1] @ wide[: t + 1]
            current[:, t + 1 :] = torch.linalg.lstsq(wide[t + 1 :].t(), owed.t()).solution.t()
    return values


def infinity_prox(row: list[float], alpha: float) -> list[float]:
    """argmin over v of ½ ‖v - row‖² + alpha ‖v‖∞: row less its projection onto the ℓ1 ball of radius alpha."""
    sizes = sorted((abs(v) for v in row), reverse=True)
    if sum(sizes) <= alpha:
        return [0.0] * len(row)
    total, theta = 0.0, 0.0
    for rank, size in enumerate(sizes, start=1):
        total += size
        if size > (total - alpha) / rank:
            theta = (total - alpha) / rank
    return [v - (1 if v > 0 else -1) * max(abs(v) - theta, 0.0) for v in row]


def magr(weight: Tensor, hessian: Tensor, alpha: float, steps: int, group: int) -> Tensor:
    """Zhang et al., arXiv 2406.00800: proximal gradient steps, ℓ∞ of each group of a row; exact largest eigenvalue."""
    largest = torch.linalg.eigvalsh(hessian)[-1]
    found = weight.clone()
    for _ in range(steps):
        found = found - (found - weight) @ hessian / largest
        rows = found.reshape(-1, group).tolist()
        found = torch.tensor([infinity_prox(row, alpha) for row in rows], dtype=weight.dtype).reshape(weight.shape)
    return found


class Budget:
    """The accumulator of arXiv 2409.17092 for one output, in Python's integers: what each tile has taken so far."""

    def __init__(self, bits: int, tile: int, low: int, high: int) -> None:
        self.limit, self.tile, self.low, self.high = 2 ** (bits - 1) - 1, tile, low, high
        self.codes: dict[int, list[int]] = {}

    def worst(self, codes: list[int]) -> tuple[int, int]:
        """The lowest and the highest sum of codes × inputs, by choosing each input at an end of its range."""
        least = sum(min(code * self.low, code * self.high) for code in codes)
        most = sum(max(code * self.low, code * self.high) for code in codes)
        return least, most

    def take(self, wanted: int, column: int) -> int:
        """The code nearest to `wanted`, toward 0, that keeps the tile from overflowing; remembered."""
        taken = self.codes.setdefault(column // self.tile, [])
        while True:
            least, most = self.worst([*taken, wanted])
            if -self.limit <= least and most <= self.limit:
                taken.append(wanted)
                return wanted
            wanted -= 1 if wanted > 0 else -1
