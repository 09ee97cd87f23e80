"""What every kernel on packed weights shares: words to codes, codes to numbers, scales to steps, rounding.

Files of this folder import each other by relative names, so that the copies in a bundle read their own neighbours.
"""

import triton
import triton.language as tl


@triton.jit
def unpack(words, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):
    """A tile of words [BLOCK_K * WIDTH / 32, BLOCK_N] as codes [BLOCK_K, BLOCK_N], rows in order of k."""
    shifts = (WIDTH * tl.arange(0, 32 // WIDTH))[:, None, None]
    fields = (words[None, :, :] >> shifts) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, [BLOCK_K, BLOCK_N])


@triton.jit
def load_words(plane, run, columns, inside, N, WIDTH: tl.constexpr, BLOCK_K: tl.constexpr):
    """The words of one run: neighbouring threads read neighbouring outputs, 16 bytes each. They are read once, so they
    leave the cache first."""
    WORDS: tl.constexpr = BLOCK_K * WIDTH // 32
    rows = run * WORDS + tl.arange(0, WORDS)
    at = plane + rows[:, None] * N + columns[None, :]
    return tl.load(at, mask=inside[None, :], other=0, eviction_policy="evict_first")


@triton.jit
def load_codes(
    plane0, plane1, run, columns, inside, N,
    WIDTH0: tl.constexpr, WIDTH1: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The codes [BLOCK_K, BLOCK_N] of one run, from one plane or two (low bits, high bits)."""
    codes = unpack(load_words(plane0, run, columns, inside, N, WIDTH0, BLOCK_K), WIDTH0, BLOCK_K, BLOCK_N)
    if WIDTH1 > 0:
        high = unpack(load_words(plane1, run, columns, inside, N, WIDTH1, BLOCK_K), WIDTH1, BLOCK_K, BLOCK_N)
        codes = codes | (high << WIDTH0)
    return codes


@triton.jit
def half_float(codes, BITS: tl.constexpr, MANTISSA: tl.constexpr, LIFT: tl.constexpr):
    """Codes of a small float as fp16: its exponent and mantissa are moved under fp16's, which counts from 2^LIFT lower.

    Subnormals come out right, for they are fp16 subnormals before the exact product. Patterns of nan are not looked for.
    """
    sign = (codes >> (BITS - 1)) << 15
    magnitude = (codes & ((1 << (BITS - 1)) - 1)) << (10 - MANTISSA)
    half = (sign | magnitude).to(tl.uint16).to(tl.float16, bitcast=True)
    factor: tl.constexpr = 2.0**LIFT
    return half * tl.full([1, 1], factor, tl.float16)


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
def load_step(
    scale, factor, group, columns, inside, stride, ROWS: tl.constexpr,
    SCALE: tl.constexpr, OUTER: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """The fp32 steps of some outputs in one group; `stride` scales a group, ROWS outputs to a scale (0: all)."""
    if ROWS == 0:
        at = scale + group * stride + columns * 0
    else:
        at = scale + group * stride + columns // ROWS
    stored = tl.load(at, mask=inside, other=0)
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
