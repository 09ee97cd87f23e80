"""Activations as codes, a scale a token or a group of channels: int8 and e4m3fn, alone or behind an RMSNorm.

Where tiles go. A program owns one row of x [M, K] and keeps all of it in registers (BLOCK >= K, a power of two): one
read, one write of a byte a channel. With NORM the row is normalized and multiplied by its gain first, and rounded to
x's type as the unfused graph would. Division and rounding are IEEE's, so codes are those that the numerics compute.

Roofline. K * (2 + 1) bytes a row in half precision against 3 operations a byte: bandwidth bound; unfused, the norm, the
scales and the codes read the row four times and write it twice.
"""

import triton
import triton.language as tl

from .decode import encode_e4m3, round_even


@triton.jit
def quantize(
    x, gain, codes, scales, M, K, stride_x, KIND: tl.constexpr, DIVISOR: tl.constexpr, LOWEST: tl.constexpr,
    HIGHEST: tl.constexpr, FLOOR: tl.constexpr, GROUP: tl.constexpr, NORM: tl.constexpr, EPS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """codes [M, K] (int8, or e4m3fn bit patterns) and fp32 scales [M, K / GROUP], one a row where GROUP is BLOCK.

    A scale is the largest magnitude divided by DIVISOR, 1 where all are 0, FLOOR at least.
    """
    row = tl.program_id(0)
    k = tl.arange(0, BLOCK)
    inside = k < K
    values = tl.load(x + row * stride_x + k, mask=inside, other=0.0)
    dtype = values.dtype
    values = values.to(tl.float32)
    if NORM:
        root = tl.sqrt_rn(tl.sum(values * values, axis=0) / K + EPS)
        values = tl.div_rn(values, root)
        values = (values * tl.load(gain + k, mask=inside, other=0.0).to(tl.float32)).to(dtype).to(tl.float32)
    groups = tl.reshape(values, [BLOCK // GROUP, GROUP])
    largest = tl.max(tl.abs(groups), axis=1)
    scale = tl.where(largest == 0, 1.0, tl.maximum(tl.div_rn(largest, tl.full([1], DIVISOR, tl.float32)), FLOOR))
    steps = tl.div_rn(groups, tl.broadcast_to(scale[:, None], [BLOCK // GROUP, GROUP]))
    if KIND == "int8":
        found = tl.minimum(tl.maximum(round_even(steps), LOWEST), HIGHEST).to(tl.int8)
    else:
        found = encode_e4m3(steps).to(tl.uint8)
    tl.store(codes + row * K + k, tl.reshape(found, [BLOCK]), mask=inside)
    group = tl.arange(0, BLOCK // GROUP)
    count = tl.cdiv(K, GROUP)
    tl.store(scales + row * count + group, scale, mask=group < count)
