"""Attention over a cache of int8 codes, read as it is.

    qcompile_triton::attend_codes(Tensor q, Tensor keys, Tensor key_scale, Tensor values, Tensor value_scale, Tensor?
    mask,
                                  float scale) -> Tensor

q [B, H, S, D]; keys and values int8 [B, G, T, D], H a multiple of G; scales float32 [B, G, T, 1]; mask bool [B or 1, 1,
S, T], true where a token is seen; the result [B, H, S, D] in q's type. A row that sees nothing gives zeros.

For few new tokens a kernel reads the codes; for many, where products count and not bytes, they are dequantized.
"""

from __future__ import annotations

import torch
from torch import Tensor

from qcompile.backends.triton.launch import EXACT, Argument, Config, Constant, Launch, ceil_div, only_shapes
from qcompile.backends.triton.ops.registration import register, run
from qcompile.backends.triton.ops.weight_only import FILL

MOST_ROWS = 64
"""Rows of scores (query heads of a key-value head x new tokens) up to which the kernel is used."""
BLOCK_T = 64


def plan(
    q: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scale: float,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that compute it; none for many new tokens, whose result is that of plain torch."""
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    if only_shapes(q) or only_shapes(keys):
        return out, []
    (b, heads, s, d), (_, groups, t, _) = q.shape, keys.shape
    rows = heads // groups * s
    if rows > MOST_ROWS:
        if q.device.type == "meta":
            return out, []
        return reference(q, keys, key_scale, values, value_scale, mask, scale), []
    parts = max(1, min(FILL // (b * groups), ceil_div(t, BLOCK_T)))
    a_part = ceil_div(ceil_div(t, parts), BLOCK_T) * BLOCK_T
    parts = ceil_div(t, a_part)
    total, block_m = b * heads * s, max(16, 1 << (rows - 1).bit_length())
    sums = q.new_empty((parts, total, d), dtype=torch.float32)
    top, weight = (q.new_empty((parts, total), dtype=torch.float32) for _ in range(2))
    seen = keys if mask is None else mask.contiguous() if mask.stride(-1) != 1 else mask
    strides = (0, 0) if mask is None else (seen.stride(0) if seen.shape[0] > 1 else 0, seen.stride(2))
    block_d = max(16, 1 << (d - 1).bit_length())
    arguments: dict[str, Argument] = {
        **{"q": q.contiguous(), "keys": keys.contiguous(), "key_scale": key_scale.contiguous()},
        **{"values": values.contiguous(), "value_scale": value_scale.contiguous(), "mask": seen},
        **{"sums": sums, "top": top, "weight": weight, "HEADS": groups, "S": s, "T": t, "D": d},
        **{"stride_mask_b": strides[0], "stride_mask_s": strides[1], "tokens_a_part": a_part},
    }
    constants: dict[str, Constant] = {
        **{"SHARED": heads // groups, "SCALE": scale, "MASKED": mask is not None},
        **{"BLOCK_M": block_m, "BLOCK_T": BLOCK_T, "BLOCK_D": block_d, "PRECISION": EXACT},
    }
    config = Config(block_m, BLOCK_T, 4, 2)
    first = Launch("attention.attend", arguments, constants, (b * groups, parts, 1), config)
    joined: dict[str, Argument] = {
        "sums": sums,
        "top": top,
        "weight": weight,
        "out": out,
        "ROWS": total,
        "D": d,
        "parts": parts,
    }
    second = Launch("attention.combine", joined, {"BLOCK_D": block_d}, (total, 1, 1), Config(1, block_d, 1, 1))
    return out, [first, second]


def reference(
    q: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    """The operator in plain torch: the cache dequantized, heads repeated."""
    repeat = q.shape[1] // keys.shape[1]
    key, value = (
        (codes.to(torch.float32) * step).to(q.dtype).repeat_interleave(repeat, 1)
        for codes, step in ((keys, key_scale), (values, value_scale))
    )
    return torch.nn.functional.scaled_dot_product_attention(q, key, value, mask, scale=scale)


def _attend_codes(
    q: Tensor,
    keys: Tensor,
    key_scale: Tensor,
    values: Tensor,
    value_scale: Tensor,
    mask: Tensor | None,
    scale: float,
) -> Tensor:
    result: Tensor = run(plan, reference, q, keys, key_scale, values, value_scale, mask, scale)
    return result


ATTEND_CODES = register("attend_codes", _attend_codes, plan, reference)
