"""y[M, N] = x[M, K] · W[N, K]ᵀ with packed weights and float activations: integers of 1 to 8 bits, MXFP4, MXFP8, NVFP4,
fp8, codebooks.

Where tiles go. `gemm`: a program owns BLOCK_M x BLOCK_N outputs of one part of K. A step takes x [BLOCK_M, BLOCK_K]
(through shared memory), unpacks codes [BLOCK_K, BLOCK_N] in registers, and multiplies in tensor cores; BLOCK_K divides
the group, so one step has one scale an output. The scale goes onto the sums (exact codes in the product, fp32 after it)
or, with SCALE_FIRST, onto the codes, in fp32, before they are rounded to x's type: that spares BLOCK_M x BLOCK_N
multiplications a step where BLOCK_M is large, and is what a float zero-point needs.
`gemv`: one row of x; a program owns BLOCK_N outputs of one part of K. No tensor cores: a thread keeps the words it loaded,
takes them apart field by field, and adds up in fp32.

Roofline. One row reads K * N * bits / 8 bytes for 2 * K * N operations: bandwidth bound by far (16 operations a byte at
int4; an H200 has 200 and more), so what counts is bytes in flight: 16-byte loads of words, several stages, and K cut in
parts (`gemm` and `gemv` with PARTIAL, then `reduce`) until every multiprocessor has two programs. From M = 64 on,
unpacking is amortised and the product is as compute bound as fp16.
"""

import triton
import triton.language as tl

from .decode import decode, load_codes, load_step, load_words


@triton.jit
def gemm(
    x, plane0, plane1, scale, zero, factor, table, bias, out, M, N, K, stride_x, stride_scale, runs, runs_a_part,
    KIND: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, LIFT: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, TIMES: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, GROUP_RUNS: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, SCALE_FIRST: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """See above. `out` is y, or with PARTIAL the sums [parts, M, N] in fp32; GROUP_RUNS is 0 for one group a row."""
    pid, part = tl.program_id(0), tl.program_id(1)
    row_blocks = tl.cdiv(M, BLOCK_M)
    # Programs that run together share columns of W: the rows of one column block come one after the other.
    rows = (pid % row_blocks) * BLOCK_M + tl.arange(0, BLOCK_M)
    columns = (pid // row_blocks) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside_m, inside_n = rows < M, columns < N
    first = part * runs_a_part
    last = tl.minimum(first + runs_a_part, runs)
    total = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for run in range(first, last):
        k = run * BLOCK_K + tl.arange(0, BLOCK_K)
        mask = inside_m[:, None] if EVEN_K else inside_m[:, None] & (k < K)[None, :]
        tile = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=mask, other=0.0)
        codes = load_codes(plane0, plane1, run, columns, inside_n, N, WIDTH0, WIDTH1, BLOCK_K, BLOCK_N)
        values = decode(codes, table, KIND, OFFSET, BITS, MANTISSA, LIFT)
        group = 0 if GROUP_RUNS == 0 else run // GROUP_RUNS
        step = load_step(scale, factor, group, columns, inside_n, stride_scale, ROWS, SCALE, OUTER, TIMES)
        if ZERO != "none":
            at = zero + group * stride_scale + (columns * 0 if ROWS == 0 else columns // ROWS)
            point = tl.load(at, mask=inside_n, other=0)
            values = values - (point.to(tl.int32) if ZERO == "int" else point.to(tl.float32))[None, :]
        if SCALE_FIRST:
            values = values.to(tl.float32) * step[None, :]
        product = tl.dot(tile, values.to(tile.dtype), out_dtype=tl.float32, input_precision=PRECISION)
        total += product if SCALE_FIRST else product * step[None, :]
    at = rows[:, None] * N + columns[None, :]
    mask = inside_m[:, None] & inside_n[None, :]
    if PARTIAL:
        tl.store(out + part * M * N + at, total, mask=mask)
    else:
        if BIAS:
            total += tl.load(bias + columns, mask=inside_n, other=0.0).to(tl.float32)[None, :]
        tl.store(out + at, total.to(out.dtype.element_ty), mask=mask)


@triton.jit
def gemv(
    x, plane0, plane1, scale, zero, factor, table, bias, out, M, N, K, stride_x, stride_scale, runs, runs_a_part,
    KIND: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, LIFT: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, TIMES: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, GROUP_RUNS: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One row of x a program (axis 2), BLOCK_N outputs (axis 0), one part of K (axis 1)."""
    columns = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    part, row = tl.program_id(1), tl.program_id(2)
    inside = columns < N
    # One plane: each field of the words meets its own stretch of x. Two: their fields lie apart, so codes first.
    FIELDS: tl.constexpr = 32 // WIDTH0 if WIDTH1 == 0 else 1
    DEPTH: tl.constexpr = BLOCK_K // FIELDS
    first = part * runs_a_part
    last = tl.minimum(first + runs_a_part, runs)
    total = tl.zeros([DEPTH, BLOCK_N], dtype=tl.float32)
    for run in tl.range(first, last, num_stages=STAGES):
        if WIDTH1 == 0:
            words = load_words(plane0, run, columns, inside, N, WIDTH0, BLOCK_K)
        else:
            words = load_codes(plane0, plane1, run, columns, inside, N, WIDTH0, WIDTH1, BLOCK_K, BLOCK_N)
        group = 0 if GROUP_RUNS == 0 else run // GROUP_RUNS
        step = load_step(scale, factor, group, columns, inside, stride_scale, ROWS, SCALE, OUTER, TIMES)
        if ZERO != "none":
            at = zero + group * stride_scale + (columns * 0 if ROWS == 0 else columns // ROWS)
            point = tl.load(at, mask=inside, other=0).to(tl.float32)
        product = tl.zeros([DEPTH, BLOCK_N], dtype=tl.float32)
        for field in tl.static_range(FIELDS):
            k = run * BLOCK_K + field * DEPTH + tl.arange(0, DEPTH)
            if EVEN_K:
                piece = tl.load(x + row * stride_x + k).to(tl.float32)
            else:
                piece = tl.load(x + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
            codes = (words >> (WIDTH0 * field)) & ((1 << WIDTH0) - 1) if WIDTH1 == 0 else words
            values = decode(codes, table, KIND, OFFSET, BITS, MANTISSA, LIFT).to(tl.float32)
            if ZERO != "none":
                values = values - point[None, :]
            product += piece[:, None] * values
        total += product * step[None, :]
    sums = tl.sum(total, axis=0)
    if PARTIAL:
        tl.store(out + (part * M + row) * N + columns, sums, mask=inside)
    else:
        if BIAS:
            sums += tl.load(bias + columns, mask=inside, other=0.0).to(tl.float32)
        tl.store(out + row * N + columns, sums.to(out.dtype.element_ty), mask=inside)


@triton.jit
def reduce(sums, bias, out, parts, MN, N, BIAS: tl.constexpr, BLOCK: tl.constexpr):
    """y = Σ over parts of sums [parts, M * N], plus the bias: in a fixed order, so equal runs give equal bits."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = at < MN
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for part in range(0, parts):
        total += tl.load(sums + part * MN + at, mask=inside, other=0.0)
    if BIAS:
        total += tl.load(bias + at % N, mask=inside, other=0.0).to(tl.float32)
    tl.store(out + at, total.to(out.dtype.element_ty), mask=inside)
