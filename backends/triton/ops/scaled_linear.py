"""y = x · Wᵀ + b of microscaling formats on both sides.

    qcompile_triton::quantize_scaled(Tensor x, str element) -> (Tensor, Tensor)
    qcompile_triton::scaled_linear(Tensor codes, Tensor exponents, Tensor[] planes, Tensor scale, Tensor? bias,
                                   str format, ScalarType dtype) -> Tensor

x [..., K] with K a multiple of 32; `element` e2m1 (MXFP4) or e4m3fn (MXFP8), scales by the rule `floor`. Codes are
uint8 [..., K], or for e2m1 two a byte [..., K / 2] in the order of a weight's packed words; exponents uint8 [..., K /
32].
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.launch import (
    EMULATE,
    Argument,
    Config,
    Constant,
    Launch,
    as_rows,
    bucket,
    ceil_div,
    dispatcher,
    only_shapes,
)
from qcompile.backends.triton.ops.registration import register, run
from qcompile.backends.triton.ops.weight_only import dequantize, parts, reduce_launch
from qcompile.numerics import choose_qparams, quantize
from qcompile.ops import parse_spec

SPECS = {"e2m1": "mxfp4 dynamic", "e4m3fn": "mxfp8_e4m3 dynamic"}
STEP_RUNS = 4
"""Runs of 32 codes that a step takes: 128 codes, what the widest block-scaled instruction multiplies twice."""


def plan_quantize(x: Tensor, element: str) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Codes, exponents, and the launch that computes them."""
    width, narrow = x.shape[-1], element == "e2m1"
    codes = x.new_empty((*x.shape[:-1], width // 2 if narrow else width), dtype=torch.uint8)
    exponents = x.new_empty((*x.shape[:-1], width // 32), dtype=torch.uint8)
    if only_shapes(x):
        return (codes, exponents), []
    rows, block = as_rows(x, width), 1 << max(5, (width - 1).bit_length())
    config = Config(1, block, 4 if block <= 4096 else 8, 1)
    arguments: dict[str, Argument] = {"x": rows, "codes": codes, "exponents": exponents}
    arguments |= {"M": rows.shape[0], "K": width, "stride_x": rows.stride(0)}
    constants: dict[str, Constant] = {"KIND": "e2m1" if narrow else "e4m3", "EMAX": 2 if narrow else 8, "BLOCK": block}
    return (codes, exponents), [Launch("scaled.quantize", arguments, constants, (rows.shape[0], 1, 1), config)]


def reference_quantize(x: Tensor, element: str) -> tuple[Tensor, Tensor]:
    """The operator in plain torch: the numerics of the package."""
    spec = parse_spec(SPECS[element])
    params = choose_qparams(x, spec)
    codes = quantize(x, params.scale, None, spec)
    if element == "e2m1":
        pairs = codes.reshape(*codes.shape[:-1], -1, 4, 2, 4)
        codes = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).flatten(-3)
    return codes, params.scale.view(torch.uint8)


def plan(
    codes: Tensor,
    exponents: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that compute it, with `config` or what the dispatcher chooses."""
    form, n = WeightFormat.parse(format), planes[0].shape[1]
    out = torch.empty((*codes.shape[:-1], n), dtype=dtype, device=codes.device)
    if only_shapes(codes):
        return out, []
    rows = codes.reshape(-1, codes.shape[-1]).contiguous()
    m = rows.shape[0]
    if config is None:
        site = f"scaled_linear {form} n={n} {str(dtype).removeprefix('torch.')} rows={bucket(m)}"
        config = dispatcher().choose(site, configs(form, n, m))
    sums = out if config.parts == 1 else out.new_empty((config.parts, m, n), dtype=torch.float32)
    steps = ceil_div(form.runs, config.runs)
    arguments: dict[str, Argument] = {
        **{"x": rows, "row_scale": exponents.reshape(m, -1).contiguous(), "plane0": planes[0], "scale": scale},
        **{"bias": rows if bias is None else bias, "out": sums, "M": m, "N": n, "K": form.k},
        **{"stride_scale": scale.shape[1], "runs": form.runs},
        "runs_a_part": ceil_div(steps, config.parts) * config.runs,
    }
    element = "e2m1" if form.element == "e2m1" else "e4m3"
    constants: dict[str, Constant] = {
        **{"LEFT": element, "RIGHT": element, "BIAS": bias is not None and config.parts == 1},
        **{"PARTIAL": config.parts > 1, "BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "RUNS": config.runs},
        "EMULATE": EMULATE,
    }
    grid = (ceil_div(m, config.block_m) * ceil_div(n, config.block_n), config.parts, 1)
    launches = [Launch("scaled.gemm", arguments, constants, grid, config)]
    if config.parts > 1:
        launches.append(reduce_launch(sums, bias, out, config.parts))
    return out, launches


def configs(form: WeightFormat, outputs: int, rows: int) -> list[Config]:
    """The configurations for so many rows, the one to take unmeasured first."""
    if rows <= 64:
        shapes = [(16 if rows <= 16 else 64, 64, 4, 3), (32, 128, 4, 3)]
    else:
        shapes = [(128, 128, 8, 3), (64, 128, 4, 2)]
    found = [(m, n, w, s, parts(form.runs, STEP_RUNS, rows, m, outputs, n)) for m, n, w, s in shapes]
    return [Config(m, n, w, s, p, STEP_RUNS) for m, n, w, s, p in found]


def reference(
    codes: Tensor,
    exponents: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """The operator in plain torch: both sides dequantized, as the program has them."""
    form = WeightFormat.parse(format)
    if form.element == "e2m1":
        pairs = codes.reshape(*codes.shape[:-1], -1, 4, 1, 4)
        codes = torch.cat([pairs & 15, pairs >> 4], -2).flatten(-4)
    step = exponents.view(torch.float8_e8m0fnu).to(torch.float32).repeat_interleave(32, -1)
    x = (form.values(codes) * step).to(dtype)
    return torch.nn.functional.linear(x, dequantize(planes, scale, None, None, format, dtype), bias)


def _quantize_scaled(x: Tensor, element: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run(plan_quantize, reference_quantize, x, element)
    return result


def _scaled_linear(
    codes: Tensor,
    exponents: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    result: Tensor = run(plan, reference, codes, exponents, planes, scale, bias, format, dtype)
    return result


QUANTIZE_SCALED = register("quantize_scaled", _quantize_scaled, plan_quantize, reference_quantize)
SCALED_LINEAR = register("scaled_linear", _scaled_linear, plan, reference)
