"""y[M, N] = x[M, K] · W[N, K]ᵀ of 8-bit codes with scales of rows and columns: int8 and e4m3fn.

Where tiles go. A program owns BLOCK_M x BLOCK_N outputs of one part of K; a step multiplies x [BLOCK_M, BLOCK_K] and W
[BLOCK_K, BLOCK_N], both through shared memory, K contiguous in both, as 8-bit tensor cores want them. Where a row has
one scale (GROUP_STEPS 0) sums stay in the tensor cores' accumulators (int32, fp32) to the end; else every BLOCK_K,
which divides the group, ends in fp32 times both scales: that is also what keeps Hopper's 14-bit fp8 accumulation
precise. A chip that does not multiply e4m3fn (NATIVE false) gets it as fp16, exactly.

Roofline. 2 * M * N * K operations for (M + N) * K bytes: compute bound from some M = 300 on (H200: 1,979 TFLOPS dense
fp8 over 4.8 TB/s = 412 operations a byte); below, K is cut in parts so that all multiprocessors read.
"""

import triton
import triton.language as tl

from .decode import half_float


@triton.jit
def as_operand(codes, KIND: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """A tile of codes as tensor cores take it."""
    if KIND == "int8":
        return codes
    elif NATIVE:
        return codes.to(tl.float8e4nv, bitcast=True)
    else:
        return tl.reshape(half_float(tl.reshape(codes.to(tl.int32), [1, ROWS, COLUMNS]), 8, 3, 8), [ROWS, COLUMNS])


@triton.jit
def gemm(
    x, row_scale, plane0, scale, bias, out, M, N, K, stride_w, stride_row, stride_scale, steps, steps_a_part,
    KIND: tl.constexpr, NATIVE: tl.constexpr, ROWS: tl.constexpr, GROUP_STEPS: tl.constexpr,
    ROW_GROUP_STEPS: tl.constexpr, BIAS: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`out` is y, or with PARTIAL the scaled sums [parts, M, N] in fp32. GROUP_STEPS and ROW_GROUP_STEPS: steps to a
    scale of W and of x, 0 for one scale along K; ROWS: outputs to a scale, 0 for all."""
    pid, part = tl.program_id(0), tl.program_id(1)
    row_blocks = tl.cdiv(M, BLOCK_M)
    rows = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = rows < M, columns < N
    output = columns * 0 if ROWS == 0 else columns // ROWS
    first = part * steps_a_part
    last = tl.minimum(first + steps_a_part, steps)
    GROUPED: tl.constexpr = GROUP_STEPS > 0 or ROW_GROUP_STEPS > 0
    sums = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.int32 if KIND == "int8" else tl.float32)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in range(first, last):
        k = step * BLOCK_K + tl.arange(0, BLOCK_K)
        at_x = x + rows[:, None] * K + k[None, :]
        left = tl.load(at_x, mask=inside_m[:, None] & (k < K)[None, :], other=0)
        at_w = plane0 + columns[None, :] * stride_w + k[:, None]
        right = tl.load(at_w, mask=inside_n[None, :] & (k < K)[:, None], other=0)
        left, right = (
            as_operand(left, KIND, NATIVE, BLOCK_M, BLOCK_K),
            as_operand(right, KIND, NATIVE, BLOCK_K, BLOCK_N),
        )
        if GROUPED:
            product = tl.dot(left, right, out_dtype=tl.int32 if KIND == "int8" else tl.float32)
            group = 0 if GROUP_STEPS == 0 else step // GROUP_STEPS
            row_group = 0 if ROW_GROUP_STEPS == 0 else step // ROW_GROUP_STEPS
            by_row = tl.load(row_scale + rows * stride_row + row_group, mask=inside_m, other=0.0)
            by_column = tl.load(scale + group * stride_scale + output, mask=inside_n, other=0).to(tl.float32)
            total += product.to(tl.float32) * by_row[:, None] * by_column[None, :]
        else:
            sums = tl.dot(left, right, sums, out_dtype=tl.int32 if KIND == "int8" else tl.float32)
    if not GROUPED:
        by_row = tl.load(row_scale + rows * stride_row, mask=inside_m, other=0.0)
        by_column = tl.load(scale + output, mask=inside_n, other=0).to(tl.float32)
        total = sums.to(tl.float32) * by_row[:, None] * by_column[None, :]
    at = rows[:, None] * N + columns[None, :]
    mask = inside_m[:, None] & inside_n[None, :]
    if PARTIAL:
        tl.store(out + part * M * N + at, total, mask=mask)
    else:
        if BIAS:
            total += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)
