"""The sums of `sums.py` in 8-bit integers: a quarter of the products' time where a processor multiplies them (VNNI).

    x ≈ s q,  q = round(x / s) in -127 … 127,  s_j = max |x_j| / 127,    H_ij += s_i s_j Σ q_i q_j

Each feature has a scale of its own for every `CHUNK` tokens. Tokens with an entry beyond `LOUD` times the root mean
square of its feature are added up as they are, so that s is at most an eighth of that: H_ij is off by about 0.04 /
√tokens of √(H_ii H_jj), a fraction of what another choice of tokens would change. Integers are exact: H stays a sum of
squares, and is the same in whatever way they are multiplied.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from qcompile.calibration import sums
from qcompile.linalg import available, product

CHUNK = 1024
"""127² × 1024 < 2²⁴: float32 holds such sums of products exactly."""
LOUD = 16.0


def add(hessian: Tensor, cross: Tensor | None, rows: Tensor, others: Tensor | None) -> None:
    """As `sums.add`."""
    for start in range(0, len(rows), CHUNK):
        here = slice(start, start + CHUNK)
        left, right = _Turned.of(rows[here]), None if others is None else _Turned.of(others[here])
        loud = left.loud() if right is None else left.loud() | right.loud()
        if bool(loud.any()):
            few, beside = rows[here], None if others is None else others[here]
            sums.add(hessian, cross, few[loud], None if beside is None else beside[loud])
            left, right = _Turned.of(few[~loud]), None if beside is None else _Turned.of(beside[~loud])
        if left.x.shape[1]:
            _add_codes(hessian, cross, left, right)


@dataclass(frozen=True, eq=False)
class _Turned:
    """Rows of tokens turned over, `x` [features, tokens], and the largest magnitude of each feature."""

    x: Tensor
    largest: Tensor

    @classmethod
    def of(cls, rows: Tensor) -> _Turned:
        x = rows.T.contiguous()
        if not x.shape[1]:
            return cls(x, x.new_zeros(len(x)))
        return cls(x, torch.maximum(x.amax(1), -x.amin(1)))

    def loud(self) -> Tensor:
        """Tokens with an entry far beyond what its feature is like."""
        limit = LOUD * (torch.linalg.vecdot(self.x, self.x) / self.x.shape[1]).sqrt()
        features = (self.largest > limit).nonzero()[:, 0]
        found: Tensor = (self.x[features].abs() > limit[features].unsqueeze(1)).any(0)
        return found

    def codes(self) -> tuple[Tensor, Tensor]:
        """int8 [features, tokens], and the scale of each feature."""
        # What is so small that its scale has no inverse has squares of 0 in any case.
        least = 128 * torch.finfo(self.x.dtype).tiny
        scale = torch.where(self.largest < least, 1, self.largest / 127)
        return torch.mul(self.x, (1 / scale).unsqueeze(1)).round_().to(torch.int8), scale


def _add_codes(hessian: Tensor, cross: Tensor | None, left: _Turned, right: _Turned | None) -> None:
    codes, scale = left.codes()
    for low, high in sums.strips(len(hessian)):
        hessian[low:high, :high] += _scaled(codes[low:high], codes[:high].T, scale[low:high], scale[:high])
    if cross is not None and right is not None:
        others, other_scale = right.codes()
        for low, high in sums.strips(len(cross)):
            cross[low:high] += _scaled(codes[low:high], others.T, scale[low:high], other_scale)


def product_of_codes(left: Tensor, right: Tensor) -> Tensor:
    """``left [m, k] @ right [k, n]`` of int8 in -127 … 127 with k at most `CHUNK`, exactly: int32, or float32 where the
    processor does not multiply bytes.
    """
    if left.device.type == "cpu" and _multiplies_bytes():
        return torch._int_mm(left, right)
    return product(left.float(), right.float())


def _scaled(left: Tensor, right: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """``left [m, k] @ right [k, n]`` of codes, times the scales of both sides."""
    found = product_of_codes(left, right) * columns
    return found.mul_(rows.unsqueeze(1))


@cache
def _multiplies_bytes() -> bool:
    return available() and bool(torch.cpu._is_vnni_supported())
