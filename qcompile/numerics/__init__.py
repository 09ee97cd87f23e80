"""Numbers: what a code is, how a scale is chosen, and the rounding between the two. `QuantSpec` says all of it."""

from __future__ import annotations

from qcompile.numerics.parameters import QParams
from qcompile.numerics.params import choose_qparams
from qcompile.numerics.qtensor import QTensor, sqnr_db
from qcompile.numerics.quantize import dequantize, quantize
from qcompile.numerics.spec import QuantSpec

__all__ = ["QParams", "QTensor", "QuantSpec", "choose_qparams", "dequantize", "quantize", "sqnr_db"]
