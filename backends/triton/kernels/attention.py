"""Attention of a few new tokens over a cache of int8 codes with a scale a token (and key-value head).

Where tiles go. A program owns one key-value head of one row, all the query heads that share it, and one part of the
cache: BLOCK_M >= (query heads a key-value head) * new tokens rows of scores. A step reads BLOCK_T tokens of keys and
values as int8, multiplies them as they are (they are exact in the type of q), and puts their scales onto scores and
probabilities: nothing is dequantized in memory. Softmax runs along (Milakov and Gimelshein 2018); `combine` joins
parts.

Roofline. 2 bytes a channel and cached token (keys and values) against 4 * (query heads a key-value head) operations:
bandwidth bound, at half of the bytes of an fp16 cache; parts keep all multiprocessors reading.
"""

import triton
import triton.language as tl


@triton.jit
def attend(
    q, keys, key_scale, values, value_scale, mask, sums, top, weight, HEADS, S, T, D, stride_mask_b, stride_mask_s,
    tokens_a_part, SHARED: tl.constexpr, SCALE: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """q [B, HEADS * SHARED, S, D]; keys and values int8 [B, HEADS, T, D], scales fp32 [B, HEADS, T]; mask bool, read at
    [b, s, t]. Writes of each part sums [parts, B * HEADS, SHARED * S, D], the highest score and the sum of weights."""
    head, part = tl.program_id(0), tl.program_id(1)
    m, d = tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    count = SHARED * S
    inside = m < count
    at_q = q + head * count * D + m[:, None] * D + d[None, :]
    query = tl.load(at_q, mask=inside[:, None] & (d < D)[None, :], other=0.0)
    highest = tl.full([BLOCK_M], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_M], tl.float32)
    found = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    first = part * tokens_a_part
    last = tl.minimum(first + tokens_a_part, T)
    for start in range(first, last, BLOCK_T):
        t = start + tl.arange(0, BLOCK_T)
        there = t < last
        at = head * T * D + t[:, None] * D + d[None, :]
        key = tl.load(keys + at, mask=there[:, None] & (d < D)[None, :], other=0).to(query.dtype)
        by_key = tl.load(key_scale + head * T + t, mask=there, other=0.0)
        scores = tl.dot(query, tl.trans(key), out_dtype=tl.float32, input_precision=PRECISION)
        scores = scores * (by_key * SCALE)[None, :]
        seen = inside[:, None] & there[None, :]
        if MASKED:
            at_mask = mask + (head // HEADS) * stride_mask_b + (m % S)[:, None] * stride_mask_s + t[None, :]
            seen = seen & (tl.load(at_mask, mask=seen, other=0) != 0)
        scores = tl.where(seen, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        base = tl.where(higher == float("-inf"), 0.0, higher)
        weights = tl.exp(scores - base[:, None])
        shrink = tl.exp(tl.where(highest == float("-inf"), float("-inf"), highest - base))
        total = total * shrink + tl.sum(weights, axis=1)
        by_value = tl.load(value_scale + head * T + t, mask=there, other=0.0)
        value = tl.load(values + at, mask=there[:, None] & (d < D)[None, :], other=0).to(query.dtype)
        weights = (weights * by_value[None, :]).to(query.dtype)
        found = found * shrink[:, None] + tl.dot(weights, value, out_dtype=tl.float32, input_precision=PRECISION)
        highest = higher
    row = (part * tl.num_programs(0) + head) * count + m
    tl.store(sums + row[:, None] * D + d[None, :], found, mask=inside[:, None] & (d < D)[None, :])
    tl.store(top + row, highest, mask=inside)
    tl.store(weight + row, total, mask=inside)


@triton.jit
def combine(sums, top, weight, out, ROWS, D, parts, BLOCK_D: tl.constexpr):
    """One row of scores a program: the parts' sums, each by how far its highest score lies below the highest of all."""
    row = tl.program_id(0)
    d = tl.arange(0, BLOCK_D)
    highest = tl.load(top + row)
    total = tl.load(weight + row)
    found = tl.load(sums + row * D + d, mask=d < D, other=0.0)
    for part in range(1, parts):
        at = part * ROWS + row
        other = tl.load(top + at)
        higher = tl.maximum(highest, other)
        base = tl.where(higher == float("-inf"), 0.0, higher)
        here = tl.exp(tl.where(highest == float("-inf"), float("-inf"), highest - base))
        there = tl.exp(tl.where(other == float("-inf"), float("-inf"), other - base))
        total = total * here + tl.load(weight + at) * there
        found = found * here + tl.load(sums + at * D + d, mask=d < D, other=0.0) * there
        highest = higher
    found = tl.where(total == 0.0, 0.0, found / tl.where(total == 0.0, 1.0, total))
    tl.store(out + row * D + d, found.to(out.dtype.element_ty), mask=d < D)
