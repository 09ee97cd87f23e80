"""A kernel that unpacks one tile of three-bit codes, as the order's page says; run with TRITON_INTERPRET=1."""

from __future__ import annotations

import torch
import triton  # type: ignore[import-not-found]
import triton.language as tl  # type: ignore[import-not-found]

from qcompile.backends.triton.pack import TileOrder

BLOCK_K, BLOCK_N = 64, 16


@triton.jit  # type: ignore[misc]
def unpack(low, high, out, N, K, BLOCK_K: tl.constexpr, BLOCK_N: tl.constexpr):  # type: ignore[no-untyped-def]
    run, columns = tl.program_id(0), tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    rows = run * (BLOCK_K // 16) + tl.arange(0, BLOCK_K // 16)
    twos = tl.load(low + rows[:, None] * N + columns[None, :])
    twos = (twos[None, :, :] >> (2 * tl.arange(0, 16))[:, None, None]) & 3
    rows = run * (BLOCK_K // 32) + tl.arange(0, BLOCK_K // 32)
    ones = tl.load(high + rows[:, None] * N + columns[None, :])
    ones = (ones[None, :, :] >> tl.arange(0, 32)[:, None, None]) & 1
    tile = tl.reshape(twos, [BLOCK_K, BLOCK_N]) + 4 * tl.reshape(ones, [BLOCK_K, BLOCK_N])
    inputs = run * BLOCK_K + tl.arange(0, BLOCK_K)
    tl.store(out + columns[None, :] * K + inputs[:, None], tile - 4)


codes = torch.randint(-4, 4, (32, 128), generator=torch.Generator().manual_seed(0)).to(torch.int8)
planes = TileOrder(3, signed=True, block_k=BLOCK_K).pack(codes)
found = torch.zeros(32, 128, dtype=torch.int32)
unpack[(128 // BLOCK_K, 32 // BLOCK_N)](*planes, found, 32, 128, BLOCK_K, BLOCK_N)
assert torch.equal(found, codes.int())
