"""Small layers with correlated inputs, and rounding by whole tensors to compare with."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from oracles.second_order import Round
from torch import Tensor

from qcompile.numerics import QParams, QuantSpec, choose_qparams, dequantize, quantize
from qcompile.rounding import Statistics


@dataclass(frozen=True)
class Layer:
    """W [out, in] and its inputs, of the float and of the quantized stream, [in, tokens]."""

    weight: Tensor
    x: Tensor
    x_hat: Tensor

    @property
    def statistics(self) -> Statistics:
        tokens = self.x.shape[1]
        h, g = self.x_hat @ self.x_hat.t(), self.x_hat @ self.x.t()
        means = self.x_hat.mean(1), self.x.mean(1)
        return Statistics(h, g, tokens, *means, power=(self.weight @ self.x).square().sum(1))


def layer(
    rows: int = 24, columns: int = 64, tokens: int = 200, seed: int = 0, dtype: torch.dtype = torch.float64
) -> Layer:
    """Inputs with a few strong directions, scales that differ, a mean, and noise between the streams."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x = normal(columns, 6) @ normal(6, tokens) + normal(columns, tokens) + 0.3
    x = x * (0.2 + 2 * torch.rand(columns, 1, generator=generator, dtype=torch.float64))
    x_hat = x + 0.15 * x.std() * normal(columns, tokens)
    return Layer(normal(rows, columns).to(dtype), x.to(dtype), x_hat.to(dtype))


def by_tensor(spec: QuantSpec, params: QParams, shape: tuple[int, int], dtype: torch.dtype = torch.float64) -> Round:
    """Rounds a column by quantizing a whole matrix that holds it."""

    def rounding(x: Tensor, column: int) -> Tensor:
        whole = torch.zeros(shape, dtype=dtype)
        whole[:, column] = x
        codes = quantize(whole, params.scale, params.zero_point, spec, params.outer)
        return dequantize(codes, params.scale, params.zero_point, spec, dtype, params.outer)[:, column]

    return rounding


def plain(weight: Tensor, spec: QuantSpec) -> Round:
    """`by_tensor` with parameters chosen from the weight."""
    return by_tensor(spec, choose_qparams(weight, spec), (weight.shape[0], weight.shape[1]), weight.dtype)
