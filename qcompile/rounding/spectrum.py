"""The size of a symmetric matrix."""

from __future__ import annotations

import torch
from torch import Tensor


def largest_eigenvalue(matrix: Tensor, steps: int = 30) -> float:
    """The largest eigenvalue of a positive semidefinite `matrix` [n, n], from below, by power iteration.

    It starts from its rows' sums of magnitudes, and so is the same every time. 0 for a matrix of zeros.
    """
    vector = matrix.abs().sum(0)
    found = 0.0
    for _ in range(steps):
        norm = torch.linalg.vector_norm(vector)
        if float(norm) == 0.0:
            return 0.0
        vector = matrix @ (vector / norm)
        found = float(torch.linalg.vector_norm(vector))
    return found
