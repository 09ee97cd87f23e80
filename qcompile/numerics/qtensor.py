"""A quantized tensor, and how far it is from the original."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.parameters import QParams
from qcompile.numerics.params import choose_qparams
from qcompile.numerics.quantize import dequantize, quantize
from qcompile.numerics.spec import QuantSpec


@dataclass(frozen=True, eq=False)
class QTensor:
    """Codes (one per int8 or uint8, in the tensor's shape), their stored parameters, and their spec.

    `scale`, `zero_point` (None for `sym`) and `outer` are as `spec.parameters` lists them.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None
    spec: QuantSpec
    outer: tuple[Tensor, ...] = ()

    @property
    def parameters(self) -> dict[str, Tensor]:
        """The stored parameters by name, as `scale`, `zero_point`, `global_scale`."""
        stored = QParams(self.scale, self.zero_point, self.outer).stored()
        names = [p.name for p in self.spec.parameters(self.codes.shape)]
        return dict(zip(names, stored, strict=True))

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """The values that the codes stand for, as `dtype` (None: as `qcompile.numerics.dequantize` says)."""
        return dequantize(self.codes, self.scale, self.zero_point, self.spec, dtype, self.outer)

    @property
    def bits_per_element(self) -> float:
        """Bits of codes and parameters together, over the elements."""
        return self.spec.bits_per_element(self.codes.shape)


def quantize_tensor(x: Tensor, spec: QuantSpec, outer: tuple[Tensor, ...] = ()) -> QTensor:
    """Choose parameters for `x` and round it (see `choose_qparams` and `quantize`)."""
    return quantize_with(x, choose_qparams(x, spec, outer), spec)


def quantize_with(x: Tensor, params: QParams, spec: QuantSpec) -> QTensor:
    """Round `x` with parameters that are known."""
    scale, zero_point, outer = params
    return QTensor(quantize(x, scale, zero_point, spec, outer), scale, zero_point, spec, outer)


def sqnr_db(x: Tensor, y: Tensor) -> float:
    """Signal to quantization noise of `y` as a stand-in for `x`, in decibels: 10 log10(sum x^2 / sum (x - y)^2).

    Summed in float64, a slice at a time; infinity where `y` equals `x`. SpecError where the shapes differ.
    """
    if x.shape != y.shape:
        raise SpecError(
            f"cannot compare a tensor of shape {list(x.shape)} with one of {list(y.shape)}; shapes must match"
        )
    signal = noise = 0.0
    for part, other in zip(torch.split(x.reshape(-1), 1 << 20), torch.split(y.reshape(-1), 1 << 20), strict=True):
        exact = part.to(torch.float64)
        signal += float(exact.square().sum())
        noise += float((exact - other.to(torch.float64)).square().sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 else -math.inf
