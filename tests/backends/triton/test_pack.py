"""The tile order: each code where the formula says, and a kernel that unpacks a tile with shifts."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompile.backends.triton.pack import TileOrder
from qcompile.errors import SpecError
from qcompile.numerics.packing import code_range


def every_code(bits: int, signed: bool, shape: tuple[int, int]) -> Tensor:
    low, high = code_range(bits, signed)
    count = shape[0] * shape[1]
    codes = torch.arange(count) % (high - low + 1) + low
    codes = codes[torch.randperm(count, generator=torch.Generator().manual_seed(0))]
    return codes.view(shape).to(torch.int8 if signed else torch.uint8)


@pytest.mark.parametrize("block_k", [32, 64])
@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_lies_where_the_formula_says(bits: int, signed: bool, block_k: int) -> None:
    order, codes = TileOrder(bits, signed, block_k), every_code(bits, signed, (6, 128))
    planes = order.pack(codes)
    assert [plane.shape for plane in planes] == [(128 * width // 32, 6) for width in order.widths]
    assert all(plane.dtype == torch.int32 for plane in planes)
    words = [plane.tolist() for plane in planes]
    lowest = code_range(bits, signed)[0]
    for n in range(6):
        for k in range(128):
            found = start = 0
            for width, plane in zip(order.widths, words, strict=True):
                run, inside = divmod(k, block_k)
                each = block_k * width // 32
                j, i = divmod(inside, each)
                found |= (plane[run * each + i][n] >> (width * j) & ((1 << width) - 1)) << start
                start += width
            assert found == int(codes[n, k]) - lowest
    assert torch.equal(order.unpack(planes), codes)


def test_three_bits_are_a_plane_of_two_and_one_of_one() -> None:
    assert TileOrder(3, True, 32).widths == (2, 1)
    low, high = TileOrder(3, False, 32).pack(torch.full((1, 32), 5, dtype=torch.uint8))
    assert low.flatten().tolist() == [0x55555555] * 2
    assert high.flatten().tolist() == [-1]


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
def test_a_kernel_unpacks_a_tile() -> None:
    kernel = Path(__file__).with_name("tile_kernel.py")
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # read when triton is imported: hence a process of its own
    done = subprocess.run([sys.executable, str(kernel)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(SpecError, match="block_k=12 does not fill int32 words; use a multiple of 8"):
        TileOrder(4, True, 12)
    with pytest.raises(SpecError, match="use a multiple of 32"):
        TileOrder(3, True, 16)
    with pytest.raises(SpecError, match="1 to 8 bits, not 9"):
        TileOrder(9, True, 32)
    order = TileOrder(4, True, 64)
    with pytest.raises(SpecError, match=r"block_k=64 does not divide rows of 96 codes; use a divisor such as 32"):
        order.pack(every_code(4, True, (2, 96)))
    with pytest.raises(SpecError, match="signed codes are int8"):
        order.pack(every_code(4, False, (2, 64)))
    with pytest.raises(SpecError, match="the value 8 lies outside -8 to 7"):
        order.pack(torch.full((2, 64), 8, dtype=torch.int8))
    with pytest.raises(SpecError, match=r"planes of \(2, 1\) bits"):
        TileOrder(3, True, 64).unpack(order.pack(every_code(4, True, (2, 64))))
