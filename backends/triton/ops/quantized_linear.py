"""y = x · Wᵀ + b of quantized activations and packed weights, in 8-bit tensor cores.

    qcompile_triton::quantized_linear(Tensor codes, Tensor row_scale, Tensor[] planes, Tensor scale, Tensor? factor,
                                      Tensor? bias, str format, ScalarType dtype) -> Tensor

codes [..., K] int8 or e4m3fn bit patterns, row_scale float32 [..., groups], as `quantize_rows` gives them; planes,
scale, factor and bias as `weight_only` takes them, for weights without zero-points; the result [..., N] in `dtype`. A
weight whose layout is `rows` has 8-bit codes of the activation's kind, one of layout `tile` integers of up to 7 bits.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.launch import (
    NATIVE,
    Argument,
    Config,
    Constant,
    Launch,
    bucket,
    ceil_div,
    dispatcher,
    only_shapes,
)
from qcompile.backends.triton.ops.registration import register, run
from qcompile.backends.triton.ops.weight_only import decoding, dequantize, parts, reduce_launch

BLOCK_K = 128
"""Codes along K of a step with 8-bit weights: two cache lines of 64 bytes."""


def plan(
    codes: Tensor,
    row_scale: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that compute it, with `config` or what the dispatcher chooses."""
    form = WeightFormat.parse(format)
    outputs = planes[0].shape[form.output_axis]
    out = torch.empty((*codes.shape[:-1], outputs), dtype=dtype, device=codes.device)
    if only_shapes(codes):
        return out, []
    rows = codes.reshape(-1, form.k).contiguous()
    row_scale = row_scale.reshape(rows.shape[0], -1).contiguous()
    step = _step(form, form.k // row_scale.shape[1])
    if config is None:
        candidates = configs(ceil_div(form.k, step), outputs, rows.shape[0])
        kind = str(codes.dtype).removeprefix("torch.")
        site = f"quantized_linear {form} n={outputs} {kind} groups={row_scale.shape[1]} rows={bucket(rows.shape[0])}"
        config = dispatcher().choose(f"{site} {str(dtype).removeprefix('torch.')}", candidates)
    sums = out if config.parts == 1 else out.new_empty((config.parts, rows.shape[0], outputs), dtype=torch.float32)
    make = _eight_bit if form.layout == "rows" else _narrow
    launches = [make(rows, row_scale, planes, scale, factor, bias, form, sums, config, step)]
    if config.parts > 1:
        launches.append(reduce_launch(sums, bias, out, config.parts))
    return out, launches


def configs(steps: int, outputs: int, rows: int) -> list[Config]:
    """The configurations for so many rows, the one to take unmeasured first."""
    if rows <= 16:
        shapes = [(16, 64, 4, 4), (16, 128, 4, 4)]
    elif rows <= 64:
        shapes = [(64, 64, 4, 4), (64, 128, 4, 3)]
    else:
        shapes = [(128, 128, 8, 3), (128, 256, 8, 3), (64, 128, 4, 3)]
    return [Config(m, n, w, s, parts(steps, 1, rows, m, outputs, n)) for m, n, w, s in shapes]


def _step(form: WeightFormat, row_group: int) -> int:
    """Codes along K of a step: they share the scales of weight and activation."""
    if form.layout == "tile":
        return form.block_k
    groups = [group for group in (form.group, row_group if row_group < form.k else 0) if group]
    return next(step for step in (BLOCK_K, 64, 32, 16) if all(group % step == 0 for group in groups))


def _eight_bit(
    x: Tensor,
    row_scale: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    form: WeightFormat,
    out: Tensor,
    config: Config,
    step: int,
) -> Launch:
    m, n = x.shape[0], planes[0].shape[0]
    row_group = form.k // row_scale.shape[1]
    steps = ceil_div(form.k, step)
    arguments: dict[str, Argument] = {
        **{"x": x, "row_scale": row_scale, "plane0": planes[0], "scale": scale},
        **{"bias": row_scale if bias is None else bias, "out": out, "M": m, "N": n, "K": form.k},
        **{"stride_w": form.padded, "stride_row": row_scale.shape[1], "stride_scale": scale.shape[1]},
        **{"steps": steps, "steps_a_part": ceil_div(steps, config.parts)},
    }
    constants: dict[str, Constant] = {
        "KIND": "int8" if form.integer else "e4m3",
        "NATIVE": True if form.integer else NATIVE,
        "ROWS": form.rows,
        "GROUP_STEPS": form.group // step,
        "ROW_GROUP_STEPS": row_group // step if row_group < form.k else 0,
        "BIAS": bias is not None and config.parts == 1,
        "PARTIAL": config.parts > 1,
        **{"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": step},
    }
    return Launch("eight_bit.gemm", arguments, constants, _grid(m, n, config), config)


def _narrow(
    x: Tensor,
    row_scale: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    form: WeightFormat,
    out: Tensor,
    config: Config,
    step: int,
) -> Launch:
    m, n, none = x.shape[0], planes[0].shape[1], planes[0]
    arguments: dict[str, Argument] = {
        **{"x": x, "row_scale": row_scale, "plane0": planes[0], "plane1": planes[1] if len(planes) > 1 else none},
        **{"scale": scale, "factor": none if factor is None else factor, "bias": none if bias is None else bias},
        **{"out": out, "M": m, "N": n, "K": form.k, "stride_scale": scale.shape[1], "runs": form.runs},
        "runs_a_part": ceil_div(form.runs, config.parts),
    }
    names = ("WIDTH0", "WIDTH1", "OFFSET", "SCALE", "OUTER", "TIMES", "ROWS", "GROUP_RUNS")
    constants: dict[str, Constant] = {name: decoding(form)[name] for name in names}
    constants |= {"BIAS": bias is not None and config.parts == 1, "PARTIAL": config.parts > 1}
    constants |= {"BLOCK_M": config.block_m, "BLOCK_N": config.block_n, "BLOCK_K": step}
    return Launch("narrow_int.gemm", arguments, constants, _grid(m, n, config), config)


def _grid(m: int, n: int, config: Config) -> tuple[int, int, int]:
    return ceil_div(m, config.block_m) * ceil_div(n, config.block_n), config.parts, 1


def reference(
    codes: Tensor,
    row_scale: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """The operator in plain torch: both sides dequantized, as the program has them."""
    form = WeightFormat.parse(format)
    values = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn)
    spread = row_scale.repeat_interleave(form.k // row_scale.shape[-1], -1)
    x = (values.to(torch.float32) * spread).to(dtype)
    return torch.nn.functional.linear(x, dequantize(planes, scale, None, factor, format, dtype), bias)


def _quantized_linear(
    codes: Tensor,
    row_scale: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    factor: Tensor | None,
    bias: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    result: Tensor = run(plan, reference, codes, row_scale, planes, scale, factor, bias, format, dtype)
    return result


QUANTIZED_LINEAR = register("quantized_linear", _quantized_linear, plan, reference)
