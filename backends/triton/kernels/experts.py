"""y[t] = x[t] · W[expert(t)]ᵀ with packed weights of several experts: one launch for all tokens.

Where tiles go. Tokens are read through `order`, sorted by expert; a program owns up to BLOCK_M tokens of one expert and
BLOCK_N outputs, and works as `weight_only.gemm` does. Which expert it has, it finds by comparing its number with the
last block of every expert, so that nothing has to be known on the host: there are as many programs as could be needed,
and those beyond the last block end at once.

Roofline. As `weight_only`, of the experts that are hit: for few tokens, each reads its expert's packed bytes once.
"""

import triton
import triton.language as tl

from .decode import decode, load_codes, load_step, parameter_at


@triton.jit
def gemm(
    x, order, starts, ends, plane0, plane1, scale, zero, factor, table, out, N, K, stride_x, stride_scale, plane0_size,
    plane1_size, scale_size, runs, EXPERTS: tl.constexpr, KIND: tl.constexpr, WIDTH0: tl.constexpr,
    WIDTH1: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr, MANTISSA: tl.constexpr, LIFT: tl.constexpr,
    SCALE: tl.constexpr, OUTER: tl.constexpr, TIMES: tl.constexpr, ZERO: tl.constexpr, ROWS: tl.constexpr,
    GROUP_RUNS: tl.constexpr, PRECISION: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """`order` int32 [tokens]; `starts` int32 [EXPERTS + 1], where an expert's tokens begin in it; `ends` int32
    [EXPERTS], the number of blocks of all experts up to each; sizes are those of one expert's planes and scales."""
    block, pid_n = tl.program_id(0), tl.program_id(1)
    e = tl.arange(0, BLOCK_E)
    all_ends = tl.load(ends + e, mask=e < EXPERTS, other=2147483647)
    expert = tl.sum((all_ends <= block).to(tl.int32), axis=0)
    if expert >= EXPERTS:
        return
    before = tl.max(tl.where(e < expert, tl.where(e < EXPERTS, all_ends, 0), 0), axis=0)
    place = tl.load(starts + expert) + (block - before) * BLOCK_M + tl.arange(0, BLOCK_M)
    inside_m = place < tl.load(starts + expert + 1)
    tokens = tl.load(order + place, mask=inside_m, other=0)
    columns = pid_n * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_n = columns < N
    expert = expert.to(tl.int64)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for run in range(0, runs, RUNS):
        k = run * BLOCK_K + tl.arange(0, RUNS * BLOCK_K)
        at_x = x + tokens[:, None] * stride_x + k[None, :]
        tile = tl.load(at_x, mask=inside_m[:, None] & (k < K)[None, :], other=0.0)
        low, high = plane0 + expert * plane0_size, plane1 + expert * plane1_size
        codes = load_codes(low, high, run, runs, columns, inside_n, N, WIDTH0, WIDTH1, BLOCK_K, BLOCK_N, RUNS)
        values = decode(codes, table, KIND, OFFSET, BITS, MANTISSA, LIFT)
        at, there = parameter_at(run, runs, columns, inside_n, stride_scale, ROWS, GROUP_RUNS, RUNS)
        step = load_step(scale + expert * scale_size, factor + expert, at, there, SCALE, OUTER, TIMES)
        if ZERO != "none":
            point = tl.load(zero + expert * scale_size + at, mask=there, other=0)
            values = values - (point.to(tl.int32) if ZERO == "int" else point.to(tl.float32))[:, None, :]
        values = tl.reshape((values.to(tl.float32) * step[:, None, :]).to(tile.dtype), [RUNS * BLOCK_K, BLOCK_N])
        total += tl.dot(tile, values, out_dtype=tl.float32, input_precision=PRECISION)
    at = tokens[:, None] * N + columns[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside_m[:, None] & inside_n[None, :])
