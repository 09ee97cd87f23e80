"""Activations as codes with scales computed as they come, behind an RMSNorm where there is a gain.

    qcompile_triton::quantize_rows(Tensor x, Tensor? gain, float eps, str spec) -> (Tensor, Tensor)

x [..., K]; codes of x's shape, int8 or bit patterns in uint8; scales float32 [..., groups]. `spec` is a QuantSpec whose
codes are int8 or e4m3fn, symmetric, with float32 scales a token or a group of channels.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.backends.triton.launch import Argument, Config, Constant, Launch, as_rows, only_shapes
from qcompile.backends.triton.ops.registration import register, run
from qcompile.numerics import QuantSpec, choose_qparams, quantize
from qcompile.numerics.element import IntElement
from qcompile.numerics.granularity import PerGroup, PerToken
from qcompile.numerics.scale_type import F32, scaling_min
from qcompile.ops import parse_spec


def quantizable(spec: QuantSpec) -> bool:
    """Whether the kernel computes the codes of `spec`."""
    signed8 = spec.element == IntElement(8) and spec.range in ("half", "narrow", "full")
    along_last = isinstance(spec.granularity, PerToken) or (
        isinstance(spec.granularity, PerGroup) and spec.granularity.axis == -1 and _power_of_two(spec.granularity.size)
    )
    plain = spec.symmetric and spec.scale == F32 and str(spec.observer) == "absmax" and spec.via is None
    return (signed8 or str(spec.element) == "e4m3fn") and along_last and plain and spec.when == "dynamic"


def _power_of_two(size: int) -> bool:
    return size >= 16 and size & (size - 1) == 0


def rounding(spec: QuantSpec) -> dict[str, Constant]:
    """The constants of a kernel that rounds by `spec`."""
    if isinstance(spec.element, IntElement):
        reach = {"narrow": 0, "half": 0.5, "full": 1}[spec.range]
        kind, divisor = "int8", 127 + reach
    else:
        kind, divisor = "e4m3", 448.0
    floor = max(scaling_min(spec.scale), spec.scaling_min or 0.0)
    return {
        "KIND": kind,
        "DIVISOR": float(divisor),
        "LOWEST": spec.qmin if kind == "int8" else 0,
        "HIGHEST": spec.qmax if kind == "int8" else 0,
        "FLOOR": floor,
    }


def plan(x: Tensor, gain: Tensor | None, eps: float, spec: str) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Codes, scales, and the launch that computes them."""
    parsed, width = parse_spec(spec), x.shape[-1]
    group = parsed.granularity.size if isinstance(parsed.granularity, PerGroup) else width
    codes = torch.empty(x.shape, dtype=parsed.storage, device=x.device)
    scales = x.new_empty((*x.shape[:-1], width // group), dtype=torch.float32)
    if only_shapes(x):
        return (codes, scales), []
    rows, block = as_rows(x, width), 1 << max(4, (width - 1).bit_length())
    config = Config(1, block, 4 if block <= 4096 else 8 if block <= 16384 else 16, 1)
    arguments: dict[str, Argument] = {
        **{"x": rows, "gain": rows if gain is None else gain, "codes": codes, "scales": scales},
        **{"M": rows.shape[0], "K": width, "stride_x": rows.stride(0)},
    }
    constants = rounding(parsed)
    constants |= {"GROUP": group if group < width else block, "NORM": gain is not None, "EPS": eps, "BLOCK": block}
    return (codes, scales), [Launch("rows.quantize", arguments, constants, (rows.shape[0], 1, 1), config)]


def reference(x: Tensor, gain: Tensor | None, eps: float, spec: str) -> tuple[Tensor, Tensor]:
    """The operator in plain torch: the numerics of the package."""
    parsed = parse_spec(spec)
    values = x if gain is None else torch.nn.functional.rms_norm(x, (x.shape[-1],), gain, eps)
    params = choose_qparams(values, parsed)
    return quantize(values, params.scale, None, parsed), params.scale


def _quantize_rows(x: Tensor, gain: Tensor | None, eps: float, spec: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run(plan, reference, x, gain, eps, spec)
    return result


QUANTIZE_ROWS = register("quantize_rows", _quantize_rows, plan, reference)
