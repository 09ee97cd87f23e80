"""y[M, N] = x[M, K] · W[N, K]ᵀ of int8 activations and integers of 1 to 7 bits, in groups or a row (W4A8 and the like).

Where tiles go. As `weight_only.gemm`, but the unpacked codes become int8 and the product is that of int8 tensor cores:
int32 sums of one run (BLOCK_K codes, which divides the group) times the group's scale, in fp32; with one scale a row
(GROUP_RUNS 0) int32 to the end. x's scale multiplies the result.

Roofline. As `weight_only` for few rows (the packed bytes are what counts); for many, int8 tensor cores do twice the
operations of fp16's.
"""

import triton
import triton.language as tl

from .decode import load_codes, load_step, parameter_at


@triton.jit
def gemm(
    x, row_scale, plane0, plane1, scale, factor, bias, out, M, N, K, stride_scale, runs, runs_a_part,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, OFFSET: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr,
    TIMES: tl.constexpr, ROWS: tl.constexpr, GROUP_RUNS: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """x int8 [M, K], row_scale fp32 [M]; `out` is y, or with PARTIAL the scaled sums [parts, M, N] in fp32."""
    pid, part = tl.program_id(0), tl.program_id(1)
    row_blocks = tl.cdiv(M, BLOCK_M)
    rows = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = rows < M, columns < N
    first = part * runs_a_part
    last = tl.minimum(first + runs_a_part, runs)
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for run in range(first, last):
        k = run * BLOCK_K + tl.arange(0, BLOCK_K)
        at_x = x + rows[:, None] * K + k[None, :]
        tile = tl.load(at_x, mask=inside_m[:, None] & (k < K)[None, :], other=0)
        codes = load_codes(plane0, plane1, run, runs, columns, inside_n, N, WIDTH0, WIDTH1, BLOCK_K, BLOCK_N, 1)
        values = tl.reshape((codes - OFFSET).to(tl.int8), [BLOCK_K, BLOCK_N])
        if GROUP_RUNS == 0:
            sums = tl.dot(tile, values, sums, out_dtype=tl.int32)
        else:
            at, there = parameter_at(run, runs, columns, inside_n, stride_scale, ROWS, GROUP_RUNS, 1)
            step = tl.reshape(load_step(scale, factor, at, there, SCALE, OUTER, TIMES), [1, BLOCK_N])
            total += tl.dot(tile, values, out_dtype=tl.int32).to(tl.float32) * step
    if GROUP_RUNS == 0:
        at, there = parameter_at(0, runs, columns, inside_n, stride_scale, ROWS, GROUP_RUNS, 1)
        step = tl.reshape(load_step(scale, factor, at, there, SCALE, OUTER, TIMES), [1, BLOCK_N])
        total = sums.to(tl.float32) * step
    total = total * tl.load(row_scale + rows, mask=inside_m, other=0.0)[:, None]
    at = rows[:, None] * N + columns[None, :]
    mask = inside_m[:, None] & inside_n[None, :]
    if PARTIAL:
        tl.store(out + part * M * N + at, total, mask=mask)
    else:
        if BIAS:
            total += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
