"""y = x · Wᵀ + b with packed weights and float activations.

    qcompile_triton::weight_only(Tensor x, Tensor[] planes, Tensor scale, Tensor? zero, Tensor? factor, Tensor? table,
                                 Tensor? bias, str format) -> Tensor

x [..., K] and the result [..., N] are float32, float16 or bfloat16; planes int32 [K * width / 32, N]
(`pack.TileOrder`); scale and zero [G, N / rows], scales that are no plain floats as bytes (uint8); factor float32 [1],
the tensor's global scale; table float32 [2^bits], the values of codes that no shift decodes; bias [N]; format a
`WeightFormat`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor

from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.launch import (
    EXACT,
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

FILL = 264
"""Programs that keep a large chip busy: two for each of an H200's 132 multiprocessors."""
STEP_K = 64
"""Codes along K that a step takes: short runs (groups of 16 or 32) are taken several at a time."""


def plan(
    x: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    format: str,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that compute it, with `config` or what the dispatcher chooses."""
    form, outputs = WeightFormat.parse(format), planes[0].shape[1]
    out = x.new_empty((*x.shape[:-1], outputs))
    if only_shapes(x):
        return out, []
    rows = as_rows(x, form.k)
    if config is None:
        candidates = configs(form, outputs, rows.shape[0])
        config = dispatcher().choose(site(form, outputs, rows.shape[0], x.dtype), candidates)
    return out, _launches(rows, planes, (scale, zero, factor, table, bias), form, out, config)


def site(form: WeightFormat, outputs: int, rows: int, dtype: torch.dtype) -> str:
    """What tuning remembers a choice by."""
    return f"weight_only {form} n={outputs} {str(dtype).removeprefix('torch.')} rows={bucket(rows)}"


def configs(form: WeightFormat, outputs: int, rows: int) -> list[Config]:
    """The configurations for so many rows, the one to take unmeasured first."""
    if rows == 1:
        shapes = [(1, 128, 4, 3), (1, 64, 2, 4), (1, 256, 4, 3)]
    elif rows <= 16:
        shapes = [(16, 64, 4, 4), (16, 128, 4, 3)]
    elif rows <= 64:
        shapes = [(64, 64, 4, 3), (32, 128, 4, 3)]
    else:
        shapes = [(128, 128, 8, 3), (64, 128, 4, 3)]
    runs = min(STEP_K // form.block_k, 4)
    return [Config(m, n, w, s, parts(form.runs, runs, rows, m, outputs, n), runs) for m, n, w, s in shapes]


def parts(runs: int, step: int, rows: int, block_m: int, outputs: int, block_n: int) -> int:
    """Parts of K, a power of two, that bring the programs to `FILL`, with four steps of `step` runs left to each."""
    programs = ceil_div(rows, block_m) * ceil_div(outputs, block_n)
    wanted = min(FILL // programs, runs // (4 * step), 16)
    return 1 << (wanted.bit_length() - 1) if wanted > 1 else 1


def _launches(
    x: Tensor,
    planes: Sequence[Tensor],
    parameters: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None],
    form: WeightFormat,
    out: Tensor,
    config: Config,
) -> list[Launch]:
    scale, zero, factor, table, bias = parameters
    m, n, single = x.shape[0], planes[0].shape[1], config.block_m == 1
    sums = x.new_empty((config.parts, m, n), dtype=torch.float32) if config.parts > 1 else out
    none = planes[0]  # stands where a kernel reads nothing
    arguments: dict[str, Argument] = {
        "x": x,
        "plane0": planes[0],
        "plane1": planes[1] if len(planes) > 1 else none,
        "scale": scale,
        "zero": none if zero is None else zero,
        "factor": none if factor is None else factor,
        "table": none if table is None else table,
        "bias": none if bias is None else bias,
        "out": sums,
        **{"M": m, "N": n, "K": form.k, "stride_x": x.stride(0), "stride_scale": scale.shape[1]},
        "runs": form.runs,
        "runs_a_part": ceil_div(form.runs, config.parts * config.runs) * config.runs,
    }
    constants: dict[str, Constant] = {
        **decoding(form),
        "BIAS": bias is not None and config.parts == 1,
        "EVEN_K": form.k == form.padded,
    }
    constants["PARTIAL"] = config.parts > 1
    if single:
        constants |= {"BLOCK_N": config.block_n, "BLOCK_K": form.block_k, "RUNS": config.runs}
        constants["STAGES"] = config.stages
        grid = (ceil_div(n, config.block_n), config.parts, m)
    else:
        constants["SCALE_FIRST"] = form.zero == "float" or config.block_m >= 64 or config.runs > 1
        constants["PRECISION"] = EXACT
        constants |= {
            "BLOCK_M": config.block_m,
            "BLOCK_N": config.block_n,
            "BLOCK_K": form.block_k,
            "RUNS": config.runs,
        }
        constants = {name: constants[name] for name in _GEMM_ORDER}
        grid = (ceil_div(m, config.block_m) * ceil_div(n, config.block_n), config.parts, 1)
    launches = [Launch("weight_only.gemv" if single else "weight_only.gemm", arguments, constants, grid, config)]
    if config.parts > 1:
        launches.append(reduce_launch(sums, bias, out, config.parts))
    return launches


_GEMM_ORDER = (
    *("KIND", "WIDTH0", "WIDTH1", "OFFSET", "BITS", "MANTISSA", "LIFT", "SCALE", "OUTER", "TIMES", "ZERO", "ROWS"),
    *("GROUP_RUNS", "BIAS", "EVEN_K", "SCALE_FIRST", "PARTIAL", "PRECISION", "BLOCK_M", "BLOCK_N", "BLOCK_K", "RUNS"),
)


def reduce_launch(sums: Tensor, bias: Tensor | None, out: Tensor, parts: int) -> Launch:
    """The launch that adds up partial sums [parts, M, N]."""
    n, total = out.shape[-1], math.prod(out.shape)
    arguments: dict[str, Argument] = {
        "sums": sums,
        "bias": sums if bias is None else bias,
        "out": out,
        "parts": parts,
        "MN": total,
        "N": n,
    }
    constants: dict[str, Constant] = {"BIAS": bias is not None, "BLOCK": 1024}
    return Launch("weight_only.reduce", arguments, constants, (ceil_div(total, 1024), 1, 1), Config(1, 1024, 4, 1))


def decoding(form: WeightFormat) -> dict[str, Constant]:
    """The constants of a kernel that decodes weights of this format."""
    widths, half = form.order.widths, form.half_float
    kind = "int" if form.integer else "float" if half is not None else "table"
    mantissa, lift = half or (0, 0)
    return {
        "KIND": kind,
        "WIDTH0": widths[0],
        "WIDTH1": widths[1] if len(widths) > 1 else 0,
        "OFFSET": form.offset,
        "BITS": form.bits,
        "MANTISSA": mantissa,
        "LIFT": lift,
        "SCALE": form.scale,
        "OUTER": form.outer,
        "TIMES": form.times,
        "ZERO": form.zero,
        "ROWS": form.rows,
        "GROUP_RUNS": form.group // form.block_k,
    }


_HELD: ContextVar[dict[object, Tensor] | None] = ContextVar("qcompile_triton_held", default=None)


@contextmanager
def holding(values: dict[object, Tensor] | None) -> Iterator[None]:
    """Keep the values of weights in `values` and take them from there; the packed tensors must outlive it."""
    token = _HELD.set(values)
    try:
        yield
    finally:
        _HELD.reset(token)


def dequantize(
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    """The weight [N, K] in float32 arithmetic, rounded once to `dtype`: what kernels are compared with."""
    held = _HELD.get()
    if held is None:
        return _dequantize(planes, scale, zero, factor, format, dtype)
    key = (planes[0].data_ptr(), format, dtype)
    if key not in held:
        held[key] = _dequantize(planes, scale, zero, factor, format, dtype)
    return held[key]


def _dequantize(
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    format: str,
    dtype: torch.dtype,
) -> Tensor:
    form = WeightFormat.parse(format)
    values = form.numbers(planes)
    spread = max(1, values.shape[0] // scale.shape[1]), form.k // scale.shape[0]
    step = scale.view(_SCALES.get(form.scale, scale.dtype)).to(torch.float32)
    if factor is not None:
        step = step / factor
    step = _spread(step * form.times if form.times != 1.0 else step, spread)
    if zero is not None:
        values = values - _spread(zero.to(torch.float32), spread)
    return (values * step).to(dtype)


_SCALES = {"e8m0": torch.float8_e8m0fnu, "e4m3": torch.float8_e4m3fn}
"""What scales that kernels read as bytes are."""


def _spread(parameter: Tensor, by: tuple[int, int]) -> Tensor:
    """[G, N / rows] as [N, K]."""
    return parameter.t().repeat_interleave(by[0], 0).repeat_interleave(by[1], 1)


def reference(
    x: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    format: str,
) -> Tensor:
    """The operator in plain torch."""
    return torch.nn.functional.linear(x, dequantize(planes, scale, zero, factor, format, x.dtype), bias)


def _weight_only(
    x: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    table: Tensor | None,
    bias: Tensor | None,
    format: str,
) -> Tensor:
    result: Tensor = run(plan, reference, x, planes, scale, zero, factor, table, bias, format)
    return result


WEIGHT_ONLY = register("weight_only", _weight_only, plan, reference)
