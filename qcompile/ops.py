"""The three operators that quantized values are made of in a program, known to torch.library (and so to torch.export).

    qcompile::choose_qparams(Tensor x, str spec) -> (Tensor scale, Tensor zero_point)
    qcompile::quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec) -> Tensor
    qcompile::dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType? dtype=None) -> Tensor

`spec` is `str(QuantSpec)`; shapes, dtypes and errors are those of `qcompile.numerics`. `choose_qparams` returns an
empty zero-point, shape [0], where the spec is symmetric; `quantize` and `dequantize` then take None. Importing this
module registers them as `torch.ops.qcompile`. They have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from qcompile import numerics
from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec


@lru_cache(maxsize=4096)
def parse_spec(text: str) -> QuantSpec:
    """`QuantSpec.parse`, remembered: an operator reads its spec at every call."""
    return QuantSpec.parse(text)


def _choose_qparams(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    parsed = parse_spec(spec)
    scale, zero_point = numerics.choose_qparams(x, parsed)
    return scale, x.new_empty(0, dtype=parsed.zero_dtype) if zero_point is None else zero_point


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    return numerics.quantize(x, scale, zero_point, parse_spec(spec))


def _dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, dtype: torch.dtype | None = None
) -> Tensor:
    return numerics.dequantize(codes, scale, zero_point, parse_spec(spec), dtype)


def _choose_qparams_fake(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
    parsed = parse_spec(spec)
    shape = parsed.scale_shape(x.shape)
    zero_shape = (0,) if parsed.symmetric else shape
    return x.new_empty(shape, dtype=parsed.scale_dtype), x.new_empty(zero_shape, dtype=parsed.zero_dtype)


def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> Tensor:
    _check_operands(x, scale, zero_point, spec)
    return x.new_empty(x.shape, dtype=parse_spec(spec).storage)


def _dequantize_fake(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, dtype: torch.dtype | None = None
) -> Tensor:
    _check_operands(codes, scale, zero_point, spec)
    return codes.new_empty(codes.shape, dtype=scale.dtype if dtype is None else dtype)


def _check_operands(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str) -> None:
    if x.dim() != scale.dim():
        raise SpecError(f"{spec}: scale of rank {scale.dim()} for a tensor of rank {x.dim()}; ranks must be equal")
    if (zero_point is None) != parse_spec(spec).symmetric:
        found = "given none" if zero_point is None else "given one"
        raise SpecError(f"{spec}: {found} as zero-point; asym takes one, sym takes none")


def _register(name: str, schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    torch.library.define(f"qcompile::{name}", schema)
    torch.library.impl(f"qcompile::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"qcompile::{name}", fake)


_register(
    "choose_qparams",
    "(Tensor x, str spec) -> (Tensor scale, Tensor zero_point)",
    _choose_qparams,
    _choose_qparams_fake,
)
_register(
    "quantize",
    "(Tensor x, Tensor scale, Tensor? zero_point, str spec) -> Tensor",
    _quantize,
    _quantize_fake,
)
_register(
    "dequantize",
    "(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType? dtype=None) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
