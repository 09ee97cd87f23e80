"""What every kernel on packed weights shares: words to codes, codes to numbers, scales to steps, rounding.

Files of this folder import each other by relative names, so that the copies in a bundle read their own neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def load_words(
    plane, run, runs, columns, inside, N, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, RUNS: tl.constexpr
):  # fmt: skip
    """The words [RUNS, words a run, BLOCK_N] of RUNS runs from `run` on: neighbouring threads read neighbouring
    outputs, 16 bytes each. They are read once, so they leave the cache first."""
    WORDS: tl.constexpr = BLOCK_K * WIDTH // 32
    which = run + tl.arange(0, RUNS)
    rows = which[:, None] * WORDS + tl.arange(0, WORDS)[None, :]
    at = plane + rows[:, :, None] * N + columns[None, None, :]
    mask = inside[None, None, :]
    if RUNS > 1:
        mask = mask & (which < runs)[:, None, None]
    return tl.load(at, mask=mask, other=0, eviction_policy="evict_first")


@triton.jit
def unpack(words, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr):
    """Words as codes [RUNS, BLOCK_K, BLOCK_N], those of a run in order of k."""
    shifts = (WIDTH * tl.arange(0, 32 // WIDTH))[None, :, None, None]
    fields = (words[:, None, :, :] >> shifts) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, [RUNS, BLOCK_K, BLOCK_N])


@triton.jit
def load_codes(
    plane0, plane1, run, runs, columns, inside, N, WIDTH0: tl.constexpr, WIDTH1: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr, RUNS: tl.constexpr,
):  # fmt: skip
    """The codes [RUNS, BLOCK_K, BLOCK_N] of some runs, from one plane or two (low bits, high bits)."""
    words = load_words(plane0, run, runs, columns, inside, N, WIDTH0, BLOCK_K, RUNS)
    codes = unpack(words, WIDTH0, BLOCK_K, BLOCK_N, RUNS)
    if WIDTH1 > 0:
        words = load_words(plane1, run, runs, columns, inside, N, WIDTH1, BLOCK_K, RUNS)
        codes = codes | (unpack(words, WIDTH1, BLOCK_K, BLOCK_N, RUNS) << WIDTH0)
    return codes


@triton.jit
def half_float(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr, LIFT: tl.constexpr):
    """Codes of a small float as fp16: its exponent and mantissa are moved under fp16's, which counts from 2^LIFT lower.

    Subnormals come out right, for they are fp16 subnormals before the exact product. Patterns of nan are not looked
    for.
    """
    sign = (codes >> (BITS - 1)) << 15
    magnitude = (codes & ((1 << (BITS - 1)) - 1)) << (10 - MANTISSA)
    half = (sign | magnitude).to(tl.uint16).to(tl.float16, bitcast=True)
    factor: tl.constexpr = 2.0**LIFT
    return half * tl.full([1, 1, 1], factor, tl.float16)


@triton.jit
def decode(
    codes, table, KIND: tl.constexpr, OFFSET: tl.constexpr, BITS: tl.constexpr,
    MANTISSA: tl.constexpr, LIFT: tl.constexpr,
):  # fmt: skip
    """Codes as numbers without their step: int32 for integers (`int`), fp16 for small floats (`float`), fp32 out of a
    table of 2^BITS entries for everything else (`table`)."""
    if KIND == "int":
        return codes - OFFSET
    elif KIND == "float":
        return half_float(codes, BITS, MANTISSA, LIFT)
    else:
        return tl.load(table + codes)


@triton.jit
def parameter_at(
    run, runs, columns, inside, stride, ROWS: tl.constexpr, GROUP_RUNS: tl.constexpr, RUNS: tl.constexpr
):  # fmt: skip
    """Where the parameters of RUNS runs lie, [RUNS, BLOCK_N], and which of them there are.

    `stride` parameters a group, ROWS outputs to a parameter (0: all), GROUP_RUNS runs to a group (0: all).
    """
    which = run + tl.arange(0, RUNS)
    group = which * 0 if GROUP_RUNS == 0 else which // GROUP_RUNS
    output = columns * 0 if ROWS == 0 else columns // ROWS
    return group[:, None] * stride + output[None, :], inside[None, :] & (which < runs)[:, None]


@triton.jit
def load_step(scale, factor, at, mask, SCALE: tl.constexpr, OUTER: tl.constexpr, TIMES: tl.constexpr):
    """fp32 steps out of stored scales: floats, powers of two as exponents (`e8m0`), or `e4m3` bit patterns."""
    stored = tl.load(scale + at, mask=mask, other=0)
    if SCALE == "e8m0":
        step = (stored.to(tl.int32) << 23).to(tl.float32, bitcast=True)
    elif SCALE == "e4m3":
        bits = ((stored.to(tl.int32) & 128) << 8) | ((stored.to(tl.int32) & 127) << 7)
        step = bits.to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    else:
        step = stored.to(tl.float32)
    if OUTER:
        step = step / tl.load(factor)
    if TIMES != 1.0:
        step = step * TIMES
    return step


@triton.jit
def round_even(x):
    """fp32 to the nearest integer, ties to even, for |x| < 2^22: adding 1.5 * 2^23 leaves no bits for a fraction."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def encode_e4m3(x):
    """fp32 as the nearest e4m3fn, ties to even, saturating at 448: the bit pattern as int32, on chips with and without
    a conversion of their own."""
    bits = x.to(tl.int32, bitcast=True)
    sign = (bits >> 24) & 128
    magnitude = tl.minimum(tl.abs(x), 448.0)
    bits = magnitude.to(tl.int32, bitcast=True)
    normal = ((bits + 524287 + ((bits >> 20) & 1)) >> 20) - 960  # 20 mantissa bits fewer, exponent biased by 7, not 127
    small = round_even(magnitude * 512.0).to(tl.int32)
    return sign | tl.where(magnitude < 0.015625, small, normal)
