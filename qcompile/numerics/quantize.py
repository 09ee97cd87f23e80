"""Codes from values and values from codes, given the scale: the same integers everywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.blocks import TILE_ELEMENTS, check_scale, split, spread, tiles
from qcompile.numerics.spec import QuantSpec


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """Codes of `x`, one per int8 or uint8, in the shape of `x`, contiguous.

    `clamp(round(x / scale) + zero_point)` for an integer zero-point (the order of ONNX QuantizeLinear), and
    `clamp(round(x / scale + zero_point))` for a float one; ties to even; float32 arithmetic, float64 for float64 `x`.
    Infinities saturate. `scale` has the rank of `x`, each dim dividing it; `zero_point` has its shape.

    Raises SpecError where shapes or the zero-point do not fit `spec`, or where `x` or `scale` holds a nan.
    """
    work = work_dtype(x)
    _check(x.shape, scale, zero_point, spec)
    codes = torch.empty(x.shape, dtype=spec.storage, device=x.device)
    scale = scale.to(work)
    zero = None if zero_point is None else zero_point.to(work)
    for here, there in tiles(x.shape, scale.shape, elements=_tile_elements(x)):
        offset = None if zero is None else spread(zero[there], x[here].shape)
        steps = float_codes(
            split(x[here].to(work), scale[there].shape), spread(scale[there], x[here].shape), offset, spec
        )
        # What is left is finite unless a nan came in, and a cast would turn that into some code in silence.
        if not bool(torch.isfinite(steps.sum())):
            raise SpecError(
                f"{spec}: the tensor to quantize (shape {list(x.shape)}) or its scale holds nan; find its source"
            )
        split(codes[here], scale[there].shape).copy_(steps)
    return codes


def float_codes(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """The codes of `x` still in its float dtype, for parameters of that dtype that broadcast against it."""
    steps = torch.div(x, scale)
    if zero_point is not None and spec.zero == "float":
        steps.add_(zero_point).round_()
    elif zero_point is not None:
        steps.round_().add_(zero_point)
    else:
        steps.round_()
    return steps.clamp_(spec.qmin, spec.qmax)


def dequantize(
    codes: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, dtype: torch.dtype | None = None
) -> Tensor:
    """`(codes - zero_point) * scale`, in the shape of `codes`, contiguous, as `dtype` (None: the scale's).

    Computed in float32 (float64 where `dtype` is) and rounded once. Raises SpecError where shapes or the zero-point do
    not fit `spec`.
    """
    dtype = scale.dtype if dtype is None else dtype
    work = torch.float64 if dtype == torch.float64 else torch.float32
    _check(codes.shape, scale, zero_point, spec)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    scale = scale.to(work)
    zero = None if zero_point is None else zero_point.to(work)
    for here, there in tiles(codes.shape, scale.shape, elements=_tile_elements(codes)):
        block = scale[there].shape
        target = split(values[here], block)
        steps = target if dtype == work else torch.empty(target.shape, dtype=work, device=codes.device)
        steps.copy_(split(codes[here], block))
        if zero is not None:
            steps.sub_(spread(zero[there], codes[here].shape))
        steps.mul_(spread(scale[there], codes[here].shape))
        if steps is not target:
            target.copy_(steps)
    return values


def work_dtype(x: Tensor) -> torch.dtype:
    """The dtype that parameters and codes of `x` are computed in; SpecError where `x` is not of a float dtype."""
    if not x.is_floating_point():
        raise SpecError(f"cannot quantize a tensor of {x.dtype}; convert it to a float dtype first")
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _check(shape: torch.Size, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> None:
    check_scale(shape, scale.shape)
    if (zero_point is None) != spec.symmetric:
        found = "none" if zero_point is None else f"one of shape {list(zero_point.shape)}"
        raise SpecError(
            f"{spec} {'has no' if spec.symmetric else 'needs a'} zero-point, and {found} was given; "
            "pass what choose_qparams returned"
        )
    if zero_point is not None and zero_point.shape != scale.shape:
        raise SpecError(
            f"zero-point of shape {list(zero_point.shape)} for a scale of shape {list(scale.shape)}; they must be equal"
        )


def _tile_elements(x: Tensor) -> int:
    # Tiles pay where there is a cache to stay in and a kernel launch is cheap.
    return TILE_ELEMENTS if x.device.type == "cpu" else max(1, x.numel())
