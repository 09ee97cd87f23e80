"""The Hadamard transform of activations, alone or with their quantization behind it.

A run of a * b channels, laid out as X [a, b], becomes A · X · Bᵀ: the transform is the Kronecker product of A and B, ±1
matrices of any known order, which are read once and stay in cache.

Where tiles go. `transform` with A_SIZE 1 (runs up to 128 wide): a program owns BLOCK_R runs, one product with B. Else a
program owns one run and does both products in tensor cores, without leaving the multiprocessor between them. The result
of the first is split into two parts of x's type, so that the second loses nothing. With KIND the run, which is then a
whole row, becomes codes with one scale before it is written.

Roofline. 2 * (a + 2 b) operations a channel for 4 bytes read and written (3 with int8): 96 operations a byte at 4096
channels, under half of what an H200 has for each (206): as fast as a copy, if products and loads overlap.
"""

import triton
import triton.language as tl

from .decode import encode_e4m3, round_even


@triton.jit
def transform(
    x, left, right, out, scales, R, A_SIZE: tl.constexpr, B_SIZE: tl.constexpr, A: tl.constexpr,
    B: tl.constexpr, FACTOR: tl.constexpr, BLOCK_R: tl.constexpr, PRECISION: tl.constexpr, KIND: tl.constexpr,
    DIVISOR: tl.constexpr, LOWEST: tl.constexpr, HIGHEST: tl.constexpr, FLOOR: tl.constexpr,
):  # fmt: skip
    """x [R, A_SIZE * B_SIZE] without gaps; `left` [A_SIZE, A_SIZE] and `right` [B_SIZE, B_SIZE] in x's type, the second
    one transposed. A and B are the next powers of two, 16 at least. KIND: `none`, `int8` or `e4m3` (see `rows`)."""
    pid = tl.program_id(0)
    b = tl.arange(0, B)
    right_at = right + b[:, None] * B_SIZE + b[None, :]
    turn = tl.load(right_at, mask=(b < B_SIZE)[:, None] & (b < B_SIZE)[None, :], other=0.0)
    if A_SIZE == 1:
        a = pid * BLOCK_R + tl.arange(0, BLOCK_R)
        at = a[:, None] * B_SIZE + b[None, :]
        mask = (a < R)[:, None] & (b < B_SIZE)[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0)
        done = tl.dot(tile, turn, out_dtype=tl.float32, input_precision=PRECISION)
    else:
        a = tl.arange(0, A)
        at = pid * A_SIZE * B_SIZE + a[:, None] * B_SIZE + b[None, :]
        mask = (a < A_SIZE)[:, None] & (b < B_SIZE)[None, :]
        tile = tl.load(x + at, mask=mask, other=0.0)
        left_at = left + a[:, None] * A_SIZE + a[None, :]
        mix = tl.load(left_at, mask=(a < A_SIZE)[:, None] & (a < A_SIZE)[None, :], other=0.0)
        half = tl.dot(mix, tile, out_dtype=tl.float32, input_precision=PRECISION)
        high = half.to(tile.dtype)
        low = (half - high.to(tl.float32)).to(tile.dtype)
        done = tl.dot(high, turn, out_dtype=tl.float32, input_precision=PRECISION)
        done = tl.dot(low, turn, done, out_dtype=tl.float32, input_precision=PRECISION)
    values = (done * FACTOR).to(tile.dtype)
    if KIND == "none":
        tl.store(out + at, values, mask=mask)
    else:
        values = values.to(tl.float32)
        if A_SIZE == 1:
            largest = tl.max(tl.abs(values), axis=1)
            scale = tl.where(
                largest == 0, 1.0, tl.maximum(tl.div_rn(largest, tl.full([1], DIVISOR, tl.float32)), FLOOR)
            )
            tl.store(scales + a, scale, mask=a < R)
            steps = tl.div_rn(values, tl.broadcast_to(scale[:, None], [BLOCK_R, B]))
        else:
            most = tl.max(tl.max(tl.abs(values), axis=1), axis=0)
            quotient = tl.div_rn(most, most * 0 + DIVISOR)
            scale = tl.where(most == 0, 1.0, tl.maximum(quotient, FLOOR))
            tl.store(scales + pid, scale)
            steps = tl.div_rn(values, tl.zeros([A, B], tl.float32) + scale)
        if KIND == "int8":
            tl.store(out + at, tl.minimum(tl.maximum(round_even(steps), LOWEST), HIGHEST).to(tl.int8), mask=mask)
        else:
            tl.store(out + at, encode_e4m3(steps).to(tl.uint8), mask=mask)
