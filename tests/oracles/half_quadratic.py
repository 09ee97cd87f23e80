"""The zero-point update of half-quadratic quantization (HQQ, Badri and Shaji 2023), one group at a time in plain loops."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Group(NamedTuple):
    """What was chosen for one group: its float zero-point, codes, values (float64) and the errors of every round tried."""

    zero: float
    codes: NDArray[np.int64]
    values: NDArray[np.float64]
    errors: list[float]


def shrink(error: float, beta: float, p: float, factor: float) -> float:
    """The proximal step of |·|^p: sign(e) · max(0, |e| - factor · |e|^(p-1) / beta). 0 stays 0."""
    size = abs(error)
    if size == 0.0:
        return 0.0
    kept = max(0.0, size - factor * math.pow(size, p - 1.0) / beta)
    return kept if error > 0 else -kept


def hqq_group(
    x: NDArray[np.float32],
    scale: float,
    zero: float,
    bits: int,
    p: float = 0.7,
    beta: float = 1.0,
    kappa: float = 1.01,
    iterations: int = 20,
    factor: float | None = None,
) -> Group:
    """x̂ = (q - zero) · scale with q = clamp(rint(x / scale + zero), 0, 2^bits - 1); float64.

    Each round: e = shrink(x - x̂); zero = mean(q - (x - e) / scale); beta ← beta · kappa. A round's error is
    mean |x - x̂| with the zero it begins with. The first round that is not better than the best ends the search, and the
    best round's zero is returned. `factor` of the shrinkage: p where None, as the derivative of |e|^p has it; the HQQ paper
    and its code write 1, which is the same as beta · p instead of beta.
    """
    factor = p if factor is None else factor
    best: Group | None = None
    errors: list[float] = []
    for _ in range(iterations):
        codes = [min(max(round(float(v) / scale + zero), 0), 2**bits - 1) for v in x]
        values = [(q - zero) * scale for q in codes]
        errors.append(sum(abs(float(v) - w) for v, w in zip(x, values, strict=True)) / len(x))
        if best is not None and not errors[-1] < best.errors[-1]:
            break
        best = Group(zero, np.array(codes), np.array(values), list(errors))
        shrunk = [shrink(float(v) - w, beta, p, factor) for v, w in zip(x, values, strict=True)]
        zero = sum(q - (float(v) - e) / scale for q, v, e in zip(codes, x, shrunk, strict=True)) / len(x)
        beta *= kappa
    assert best is not None
    return best._replace(errors=errors)
