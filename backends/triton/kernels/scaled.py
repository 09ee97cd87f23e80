"""y[M, N] = x[M, K] · W[N, K]ᵀ of microscaling formats on both sides, by the chip's block-scaled product.

`quantize` makes x's codes: 32 channels share a power of two, 2^(⌊log2 amax⌋ - emax), the rule of the OCP specification.
`gemm` hands codes and exponents to `tl.dot_scaled`: tensor cores that multiply them as they are (sm_100, sm_120,
gfx950) or Triton's own decoding into bf16. With EMULATE, for chips whose Triton knows no fp8 at all (sm_80), both sides
are decoded here, exactly, to bf16 or fp32.

Where tiles go. A step takes RUNS runs of 32 codes. W's words are taken apart into bytes in registers: two codes of four
bits stay together, so the k of a byte is that of the tile order (`pack`), and x's codes are written in the same order:
sums over k do not mind. Both scales lie with K in the last axis, as `dot_scaled` reads them.

Roofline. 4.25 bits a weight and an activation; on sm_100 nine PFLOPS: bandwidth bound up to some M = 1000.
"""

import triton
import triton.language as tl

from .decode import encode_e4m3, half_float, load_words, unpack


@triton.jit
def encode_e2m1(x):
    """fp32 as the nearest e2m1, ties to even, saturating at 6: codes 0 to 15 as int32."""
    size = tl.abs(x)
    # Thresholds between 0, .5, 1, 1.5, 2, 3, 4, 6; a tie goes to the even code, so every second bound belongs below.
    code = (size > 0.25).to(tl.int32) + (size >= 0.75).to(tl.int32) + (size > 1.25).to(tl.int32)
    code += (size >= 1.75).to(tl.int32) + (size > 2.5).to(tl.int32) + (size >= 3.5).to(tl.int32)
    code += (size > 5.0).to(tl.int32)
    sign = (x.to(tl.int32, bitcast=True) >> 28) & 8
    return code | sign


@triton.jit
def quantize(
    x, codes, exponents, M, K, stride_x, KIND: tl.constexpr, EMAX: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """One row a program: codes, a byte each [M, K] or two of four bits a byte [M, K / 2], exponents uint8 [M, K /
    32]."""
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    values = tl.load(x + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
    groups = tl.reshape(values, [BLOCK // 32, 32])
    largest = tl.max(tl.abs(groups), axis=1)
    exponent = tl.maximum(((largest.to(tl.int32, bitcast=True) >> 23) & 255) - EMAX, 0)
    # x / 2^(e - 127) as a product: its factor 2^(127 - e) has the exponent 254 - e, and is two factors where that is 0.
    lift = tl.maximum(254 - exponent, 1)
    steps = groups * (lift << 23).to(tl.float32, bitcast=True)[:, None]
    if KIND == "e2m1":
        found = encode_e2m1(steps)
        # The bytes of a word of the tile order: byte b of word i holds k = 8 b + i and 8 b + 4 + i of 32.
        found = tl.permute(tl.reshape(found, [BLOCK // 32, 4, 2, 4]), (0, 1, 3, 2))
        low, high = tl.split(found)
        packed = tl.reshape(low | (high << 4), [BLOCK // 2]).to(tl.uint8)
        at = tl.arange(0, BLOCK // 2)
        tl.store(codes + row * (K // 2) + at, packed, mask=at < K // 2)
    else:
        found = encode_e4m3(steps)
        tl.store(codes + row * K + k, tl.reshape(found, [BLOCK]).to(tl.uint8), mask=k < K)
    group = tl.arange(0, BLOCK // 32)
    tl.store(exponents + row * (K // 32) + group, exponent.to(tl.uint8), mask=group < K // 32)


@triton.jit
def spread_scales(exponents, RUNS: tl.constexpr, ROWS: tl.constexpr, BYTES: tl.constexpr):
    """Exponents [ROWS, RUNS] as fp32 steps of every byte [ROWS, BYTES]."""
    steps = (exponents.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    return tl.reshape(tl.broadcast_to(steps[:, :, None], [ROWS, RUNS, BYTES // RUNS]), [ROWS, BYTES])


@triton.jit
def decoded(
    codes, steps, BITS: tl.constexpr, MANTISSA: tl.constexpr, LIFT: tl.constexpr, ROWS: tl.constexpr,
    COLUMNS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """Codes times steps, in the type that EMULATE names."""
    half = half_float(tl.reshape(codes, [1, ROWS, COLUMNS]), BITS, MANTISSA, LIFT)
    numbers = tl.reshape(half, [ROWS, COLUMNS]).to(tl.float32) * steps
    return numbers.to(tl.bfloat16) if EMULATE == "bf16" else numbers


@triton.jit
def emulated(
    left, by_row, right, by_column, total, KIND: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    BYTES: tl.constexpr, RUNS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """What `tl.dot_scaled` computes, of decoded numbers: for e2m1 the low codes of all bytes, then the high ones."""
    left, right = left.to(tl.int32), right.to(tl.int32)
    row_steps = spread_scales(by_row, RUNS, BLOCK_M, BYTES)
    column_steps = tl.trans(spread_scales(by_column, RUNS, BLOCK_N, BYTES))
    if KIND == "e2m1":
        for shift in tl.static_range(0, 8, 4):
            a = decoded((left >> shift) & 15, row_steps, 4, 1, 14, BLOCK_M, BYTES, EMULATE)
            b = decoded((right >> shift) & 15, column_steps, 4, 1, 14, BYTES, BLOCK_N, EMULATE)
            total = tl.dot(a, b, total, out_dtype=tl.float32, input_precision="ieee")
    else:
        a = decoded(left, row_steps, 8, 3, 8, BLOCK_M, BYTES, EMULATE)
        b = decoded(right, column_steps, 8, 3, 8, BYTES, BLOCK_N, EMULATE)
        total = tl.dot(a, b, total, out_dtype=tl.float32, input_precision="ieee")
    return total


@triton.jit
def gemm(
    x, row_scale, plane0, scale, bias, out, M, N, K, stride_scale, runs, runs_a_part, LEFT: tl.constexpr,
    RIGHT: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
    RUNS: tl.constexpr, EMULATE: tl.constexpr,
):  # fmt: skip
    """LEFT and RIGHT are `e2m1` or `e4m3`, both the same. x as `quantize` leaves it; W's planes and exponents [K / 32,
    N]."""
    pid, part = tl.program_id(0), tl.program_id(1)
    row_blocks = tl.cdiv(M, BLOCK_M)
    rows = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = rows < M, columns < N
    BYTES: tl.constexpr = RUNS * (16 if RIGHT == "e2m1" else 32)
    bytes_a_row = K // 2 if RIGHT == "e2m1" else K
    WIDTH: tl.constexpr = 4 if RIGHT == "e2m1" else 8
    first = part * runs_a_part
    last = tl.minimum(first + runs_a_part, runs)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for run in range(first, last, RUNS):
        at = run * (BYTES // RUNS) + tl.arange(0, BYTES)
        there = inside_m[:, None] & (at < bytes_a_row)[None, :]
        left = tl.load(x + rows[:, None] * bytes_a_row + at[None, :], mask=there, other=0)
        words = load_words(plane0, run, runs, columns, inside_n, N, WIDTH, 32, RUNS)
        # A word has four bytes, whether it holds four codes or eight.
        right = tl.reshape(unpack(words, 8, BYTES // RUNS, BLOCK_N, RUNS), [BYTES, BLOCK_N]).to(tl.uint8)
        group = run + tl.arange(0, RUNS)
        mask = group < runs
        at_left = row_scale + rows[:, None] * runs + group[None, :]
        by_row = tl.load(at_left, mask=inside_m[:, None] & mask[None, :], other=0)
        at_right = scale + group[None, :] * stride_scale + columns[:, None]
        by_column = tl.load(at_right, mask=inside_n[:, None] & mask[None, :], other=0)
        if EMULATE == "none":
            total = tl.dot_scaled(left, by_row, LEFT, right, by_column, RIGHT, total)
        else:
            total = emulated(left, by_row, right, by_column, total, LEFT, BLOCK_M, BLOCK_N, BYTES, RUNS, EMULATE)
    at = rows[:, None] * N + columns[None, :]
    mask = inside_m[:, None] & inside_n[None, :]
    if PARTIAL:
        tl.store(out + part * M * N + at, total, mask=mask)
    else:
        if BIAS:
            total += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
