"""y[M, N] = x[M, K] · W[N, K]ᵀ with packed weights and float activations: integers of 1 to 8 bits, MXFP4, MXFP8, NVFP4,
fp8, codebooks.

Where tiles go. Codes come in runs of BLOCK_K along K, which divides the group, so that a run has one scale an output;
a step takes RUNS of them. `gemm`: a program owns BLOCK_M x BLOCK_N outputs of one part of K. A step takes x [BLOCK_M,
RUNS * BLOCK_K] (through shared memory), unpacks codes [RUNS * BLOCK_K, BLOCK_N] in registers, and multiplies in tensor
cores. With one run a step the scale goes onto the sums: exact codes in the product, fp32 behind it. With SCALE_FIRST it
goes onto the codes, in fp32, before they are rounded to x's type: that spares BLOCK_M x BLOCK_N multiplications a step,
and is what several runs, or a float zero-point, need.
`gemv`: one row of x; a program owns BLOCK_N outputs of one part of K. No tensor cores: a thread keeps the words it
loaded, takes them apart field by field, and adds up in fp32.

Roofline. One row reads K * N * bits / 8 bytes for 2 * K * N operations: bandwidth bound by far (16 operations a byte at
int4; an H200 has 200 and more), so what counts is bytes in flight: 16-byte loads of words, several stages, and K cut in
parts (`gemm` and `gemv` with PARTIAL, then `reduce`) until every multiprocessor has two programs. From M = 64 on,
unpacking is amortised and the product is as compute bound as fp16.
"""

import triton
import triton.language as tl

from .decode import decode, load_codes, load_step, load_words, parameter_at


@triton.jit
def gemm(
    x, plane0, plane1, scale, zero, factor, table, bias, out, M, N, K, stride_x, stride_scale, runs, runs_a_part,
    KIND: tl.constexpr, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, LIFT: tl.constexpr, SCALE: tl.constexpr, OUTER: tl.constexpr, TIMES: tl.constexpr,
    ZERO: tl.constexpr, ROWS: tl.constexpr, GROUP_RUNS: tl.constexpr, BIAS: tl.constexpr,
    EVEN_K: tl.constexpr, SCALE_FIRST: tl.constexpr, PARTIAL: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, RUNS: tl.constexpr,
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
    for run in range(first, last, RUNS):
        k = run * BLOCK_K + tl.arange(0, RUNS * BLOCK_K)
        mask = inside_m[:, None] if EVEN_K and RUNS == 1 else inside_m[:, None] & (k < K)[None, :]
        tile = tl.load(x + rows[:, None] * stride_x + k[None, :], mask=mask, other=0.0)
        codes = load_codes(
            plane0, plane1, run, runs, columns, inside_n, N, WIDTH0, WIDTH1, BLOCK_K, BLOCK_N, RUNS
        )  # fmt: skip
        values = decode(codes, table, KIND, OFFSET, BITS, MANTISSA, LIFT)
        at, there = parameter_at(run, runs, columns, inside_n, stride_scale, ROWS, GROUP_RUNS, RUNS)
        step = load_step(scale, factor, at, there, SCALE, OUTER, TIMES)
        if ZERO != "none":
            point = tl.load(zero + at, mask=there, other=0)
            values = values - (point.to(tl.int32) if ZERO == "int" else point.to(tl.float32))[:, None, :]
        if SCALE_FIRST:
            values = values.to(tl.float32) * step[:, None, :]
        values = tl.reshape(values.to(tile.dtype), [RUNS * BLOCK_K, BLOCK_N])
        product = tl.dot(tile, values, out_dtype=tl.float32, input_precision=PRECISION)
        total += product if SCALE_FIRST else product * tl.reshape(step, [1, BLOCK_N])
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
    EVEN_K: tl.constexpr, PARTIAL: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    RUNS: tl.constexpr, STAGES: tl.constexpr,
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
    total = tl.zeros([RUNS, DEPTH, BLOCK_N], dtype=tl.float32)
    for run in tl.range(first, last, RUNS, num_stages=STAGES):
        if WIDTH1 == 0:
            words = load_words(plane0, run, runs, columns, inside, N, WIDTH0, BLOCK_K, RUNS)
        else:
            words = load_codes(plane0, plane1, run, runs, columns, inside, N, WIDTH0, WIDTH1, BLOCK_K, BLOCK_N, RUNS)
        at, there = parameter_at(run, runs, columns, inside, stride_scale, ROWS, GROUP_RUNS, RUNS)
        step = load_step(scale, factor, at, there, SCALE, OUTER, TIMES)
        if ZERO != "none":
            point = tl.load(zero + at, mask=there, other=0).to(tl.float32)
        product = tl.zeros([RUNS, DEPTH, BLOCK_N], dtype=tl.float32)
        starts = (run + tl.arange(0, RUNS)) * BLOCK_K
        for field in tl.static_range(FIELDS):
            k = starts[:, None] + field * DEPTH + tl.arange(0, DEPTH)[None, :]
            if EVEN_K and RUNS == 1:
                piece = tl.load(x + row * stride_x + k).to(tl.float32)
            else:
                piece = tl.load(x + row * stride_x + k, mask=k < K, other=0.0).to(tl.float32)
            codes = (words >> (WIDTH0 * field)) & ((1 << WIDTH0) - 1) if WIDTH1 == 0 else words
            values = decode(codes, table, KIND, OFFSET, BITS, MANTISSA, LIFT).to(tl.float32)
            if ZERO != "none":
                values = values - point[:, None, :]
            product += piece[:, :, None] * values
        total += product * step[:, None, :]
    sums = tl.sum(tl.reshape(total, [RUNS * DEPTH, BLOCK_N]), axis=0)
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
