"""Codes from values and values from codes, given the parameters: the same codes everywhere."""

from __future__ import annotations

from collections.abc import Iterator
from types import EllipsisType

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.blocks import TILE_ELEMENTS, check_scale, row_chunks, split, spread, tiles
from qcompile.numerics.element import IntElement
from qcompile.numerics.fit import work_dtype
from qcompile.numerics.parameters import QParams, outer_names
from qcompile.numerics.scale_type import DoubleScale
from qcompile.numerics.scaling import decode_double, to_steps
from qcompile.numerics.spec import QuantSpec

Outer = tuple[Tensor, ...]


def quantize(x: Tensor, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, outer: Outer = ()) -> Tensor:
    """Codes of `x`, one per int8 or uint8, in the shape of `x`, contiguous.

    With the step that `scale` and `outer` stand for: integers are `clamp(round(x / step) + zero_point)` for an integer
    zero-point (the order of ONNX QuantizeLinear) and `clamp(round(x / step + zero_point))` for a float one; other
    elements are the code nearest to `x / step`. Ties to even; float32 arithmetic, float64 for float64 `x`. Infinities
    saturate. `scale` has the rank of `x`, each dim dividing it; `zero_point` has its shape.

    Raises SpecError where shapes or parameters do not fit `spec`, or where `x` or `scale` holds a nan that the format
    has no code for. Where a scale is nan, codes are those of 0.
    """
    work = work_dtype(x)
    _check(x.shape, scale, zero_point, spec, outer)
    codes = torch.empty(x.shape, dtype=spec.storage, device=x.device)
    try:
        for rows, params in _by_rows(x.shape, QParams(scale, zero_point, outer), spec):
            _encode(x[rows], codes[rows], params, spec, work)
    except _FoundNan:
        problem = f"the tensor to quantize (shape {list(x.shape)}) or its scale holds nan"
        raise SpecError(f"{spec}: {problem}; find its source") from None
    return codes


def dequantize(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor | None,
    spec: QuantSpec,
    dtype: torch.dtype | None = None,
    outer: Outer = (),
) -> Tensor:
    """The values of codes, in their shape, contiguous, as `dtype` (None: the scale's where that is float32, float16 or
    bfloat16, else float32).

    `(codes - zero_point) * step` for integers, value of the code * step for other elements. Computed in float32
    (float64 where `dtype` is) and rounded once. Raises SpecError where shapes or parameters do not fit `spec`.
    """
    dtype = value_dtype(scale.dtype) if dtype is None else dtype
    _check(codes.shape, scale, zero_point, spec, outer)
    values = torch.empty(codes.shape, dtype=dtype, device=codes.device)
    for rows, params in _by_rows(codes.shape, QParams(scale, zero_point, outer), spec):
        _decode(codes[rows], values[rows], params, spec)
    return values


def value_dtype(scale_dtype: torch.dtype) -> torch.dtype:
    """The dtype of dequantized values where none is asked for."""
    return scale_dtype if scale_dtype in (torch.float32, torch.float16, torch.bfloat16) else torch.float32


def int_codes(x: Tensor, step: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """The codes of `x` still in its float dtype, for parameters of that dtype that broadcast against it."""
    steps = torch.div(x, step)
    if zero_point is not None and spec.zero != "int":
        steps.add_(zero_point).round_()
    elif zero_point is not None:
        steps.round_().add_(zero_point)
    else:
        steps.round_()
    return steps.clamp_(spec.qmin, spec.qmax)


def round_steps(x: Tensor, step: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    """What is dequantized for `x`, in steps: a new tensor of its dtype."""
    if not isinstance(spec.element, IntElement):
        return spec.element.round(torch.div(x, step))
    codes = int_codes(x, step, zero_point, spec)
    return codes if zero_point is None else codes.sub_(zero_point)


class _FoundNan(Exception):
    """A value to encode is nan, and the element has no code for it."""


def _encode(x: Tensor, codes: Tensor, params: QParams, spec: QuantSpec, work: torch.dtype) -> None:
    """Write the codes of some rows."""
    step, zero, via = decoded(params, spec, x.shape, work)
    lost = bool(torch.isnan(step).any()) if spec.keeps_nan else False
    for here, there in tiles(x.shape, step.shape, elements=_tile_elements(x)):
        values = x[here].to(work)
        if via is not None and spec.via is not None:
            values = spec.via.round(values / via[here])
        offset = None if zero is None else spread(zero[there], values.shape)
        steps, view = spread(step[there], values.shape), split(values, step[there].shape)
        if lost:
            view, steps = torch.where(torch.isnan(steps), 0, view), torch.where(torch.isnan(steps), 1, steps)
        split(codes[here], step[there].shape).copy_(_codes(view, steps, offset, spec))


def _codes(x: Tensor, steps: Tensor, zero_point: Tensor | None, spec: QuantSpec) -> Tensor:
    if isinstance(spec.element, IntElement):
        codes = int_codes(x, steps, zero_point, spec)
        # What is left is finite unless a nan came in, and a cast would turn that into some code in silence.
        if not bool(torch.isfinite(codes.sum())):
            raise _FoundNan
        return codes
    scaled = x if spec.when == "no_scale" else torch.div(x, steps)
    # The sum is nan for infinities of both signs, too; those saturate.
    if not spec.element.has_nan and bool(torch.isnan(scaled.sum())) and bool(torch.isnan(scaled).any()):
        raise _FoundNan
    return spec.element.encode(scaled)


def _decode(codes: Tensor, values: Tensor, params: QParams, spec: QuantSpec) -> None:
    """Write the values of some rows."""
    work = torch.float64 if values.dtype == torch.float64 else torch.float32
    step, zero, via = decoded(params, spec, codes.shape, work)
    direct = values.dtype == work and via is None
    for here, there in tiles(codes.shape, step.shape, elements=_tile_elements(codes)):
        source, target = codes[here], split(values[here], step[there].shape)
        found = target if direct else torch.empty(target.shape, dtype=work, device=codes.device)
        if isinstance(spec.element, IntElement):
            found.copy_(split(source, step[there].shape))
            if zero is not None:
                found.sub_(spread(zero[there], source.shape))
        else:
            found.copy_(split(spec.element.decode(source), step[there].shape))
        if spec.when != "no_scale":
            found.mul_(spread(step[there], source.shape))
        if via is not None and spec.via is not None:
            values[here].copy_(spec.via.round(found.view(source.shape)) * via[here])
        elif not direct:
            target.copy_(found)


def decoded(
    params: QParams, spec: QuantSpec, shape: torch.Size, work: torch.dtype
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Steps, zero-points and the scale of `via`, as numbers of the work dtype; the last one seen in `shape`."""
    scale, zero, outer = params
    step = to_steps(scale, spec, outer).to(work)
    via = None if spec.via is None else outer[-1].to(work).expand(shape)
    if zero is not None and isinstance(spec.zero, DoubleScale):
        own = dict(zip(outer_names(spec), outer, strict=True))
        zero = decode_double(zero, own["zero_step"], own.get("zero_offset"), spec.zero)
    return step, None if zero is None else zero.to(work), via


def _by_rows(shape: torch.Size, params: QParams, spec: QuantSpec) -> Iterator[tuple[slice | EllipsisType, QParams]]:
    """Rows and their parameters, few enough at once for what is computed per scale to stay small."""
    doubled = isinstance(spec.scale, DoubleScale) or isinstance(spec.zero, DoubleScale)
    chunks = [slice(None)] if doubled else list(row_chunks(shape, params.scale.shape))
    if len(chunks) < 2:
        yield ..., params
        return
    for rows in chunks:
        outer = tuple(t[rows] if t.shape[0] == shape[0] else t for t in params.outer)
        zero = None if params.zero_point is None else params.zero_point[rows]
        yield rows, QParams(params.scale[rows], zero, outer)


def _check(shape: torch.Size, scale: Tensor, zero_point: Tensor | None, spec: QuantSpec, outer: Outer) -> None:
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
    if len(outer) != len(names := outer_names(spec)):
        wanted = ", ".join(names) or "none"
        raise SpecError(f"{spec}: {len(outer)} outer parameters were given, it has {wanted}; pass choose_qparams's")


def _tile_elements(x: Tensor) -> int:
    # Tiles pay where there is a cache to stay in and a kernel launch is cheap.
    return TILE_ELEMENTS if x.device.type == "cpu" else max(1, x.numel())
