"""The three operators that quantized values are made of in a program, known to torch.library (and so to torch.export).

    qcompile::choose_qparams(Tensor x, str spec, Tensor[]? outer=None) -> Tensor[]
    qcompile::quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec, Tensor[]? outer=None) -> Tensor
    qcompile::dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType? dtype=None,
                         Tensor[]? outer=None) -> Tensor

`spec` is `str(QuantSpec)`; shapes, dtypes and errors are those of `qcompile.numerics`. `choose_qparams` returns the
stored parameters in the order of `QuantSpec.parameters`: the scale, the zero-point where the spec is asymmetric, and
the outer parameters, which most specs have none of (NVFP4 has its global scale). Given `outer` it takes those for its
own. Importing this module registers them as `torch.ops.qcompile`, beside `qcompile::hadamard` (`hadamard/op.py`).
They have no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import TypeAlias

import torch
from torch import Tensor

import qcompile.hadamard.op  # noqa: F401  registers qcompile::hadamard
from qcompile import numerics
from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec
from qcompile.numerics.parameters import outer_names
from qcompile.numerics.quantize import value_dtype

Outer: TypeAlias = Sequence[Tensor] | None


@lru_cache(maxsize=4096)
def parse_spec(text: str) -> QuantSpec:
    """`QuantSpec.parse`, remembered: an operator reads its spec at every call."""
    return QuantSpec.parse(text)


def _choose_qparams(x: Tensor, spec: str, outer: Outer = None) -> list[Tensor]:
    # An operator's results are tensors of their own, never its arguments.
    stored = numerics.choose_qparams(x, parse_spec(spec), tuple(outer or ())).stored()
    return [t.clone() if any(t is given for given in outer or ()) else t for t in stored]


def _quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, outer: Outer = None) -> Tensor:
    return numerics.quantize(x, scale, zero_point, parse_spec(spec), tuple(outer or ()))


def _dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    dtype: torch.dtype | None = None,
    outer: Outer = None,
) -> Tensor:
    return numerics.dequantize(codes, scale, zero_point, parse_spec(spec), dtype, tuple(outer or ()))


def _choose_qparams_fake(x: Tensor, spec: str, outer: Outer = None) -> list[Tensor]:
    return [x.new_empty(p.shape, dtype=p.dtype) for p in parse_spec(spec).parameters(x.shape)]


def _quantize_fake(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, outer: Outer = None) -> Tensor:
    _check_operands(x, scale, zero_point, spec, outer)
    return x.new_empty(x.shape, dtype=parse_spec(spec).storage)


def _dequantize_fake(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: str,
    dtype: torch.dtype | None = None,
    outer: Outer = None,
) -> Tensor:
    _check_operands(codes, scale, zero_point, spec, outer)
    return codes.new_empty(codes.shape, dtype=value_dtype(scale.dtype) if dtype is None else dtype)


def _check_operands(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: str, outer: Outer) -> None:
    if x.dim() != scale.dim():
        raise SpecError(f"{spec}: scale of rank {scale.dim()} for a tensor of rank {x.dim()}; ranks must be equal")
    if (zero_point is None) != parse_spec(spec).symmetric:
        found = "given none" if zero_point is None else "given one"
        raise SpecError(f"{spec}: {found} as zero-point; asym takes one, sym takes none")
    if len(outer or ()) != len(names := outer_names(parse_spec(spec))):
        raise SpecError(f"{spec}: given {len(outer or ())} outer parameters; it takes {', '.join(names) or 'none'}")


def _register(name: str, schema: str, implementation: Callable[..., object], fake: Callable[..., object]) -> None:
    torch.library.define(f"qcompile::{name}", schema)
    torch.library.impl(f"qcompile::{name}", "CompositeExplicitAutograd", implementation)
    torch.library.register_fake(f"qcompile::{name}", fake)


_register(
    "choose_qparams", "(Tensor x, str spec, Tensor[]? outer=None) -> Tensor[]", _choose_qparams, _choose_qparams_fake
)
_register(
    "quantize",
    "(Tensor x, Tensor scale, Tensor? zero_point, str spec, Tensor[]? outer=None) -> Tensor",
    _quantize,
    _quantize_fake,
)
_register(
    "dequantize",
    "(Tensor codes, Tensor scale, Tensor? zero_point, str spec, ScalarType? dtype=None, "
    "Tensor[]? outer=None) -> Tensor",
    _dequantize,
    _dequantize_fake,
)
