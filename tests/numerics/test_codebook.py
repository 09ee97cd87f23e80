"""nf4 and fp4 against the values and thresholds that bitsandbytes publishes."""

from __future__ import annotations

import math
import statistics

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.codebook import CODEBOOKS, Codebook

# The kernels' decision trees, as float32 literals: x > threshold takes the upper side.
NF4_THRESHOLDS = """
    -0.8480964004993439 -0.6106329262256622 -0.4599952697753906 -0.33967943489551544 -0.23460740596055984
    -0.13791173323988914 -0.045525018125772476 0.03979014977812767 0.1202552504837513 0.2035212516784668
    0.2920137718319893 0.3893125355243683 0.5016634166240692 0.6427869200706482 0.8614784181118011
"""
NF4_VALUES = """
    -1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
    -0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
    0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
FP4_MAGNITUDES = [0.0, 5.208333333e-03, 0.66666667, 1.0, 0.33333333, 0.5, 0.16666667, 0.25]
FP4_THRESHOLDS = [0.00260417, 0.0859375, 0.20833333, 0.29166667, 0.4166667, 0.583333, 0.8333333]
FP4_CODES = [0b000, 0b001, 0b110, 0b111, 0b100, 0b101, 0b010, 0b011]
"""Code of a magnitude over that many thresholds."""


def thresholds(name: str) -> list[float]:
    both = [*FP4_THRESHOLDS, *(-at for at in FP4_THRESHOLDS)] if name == "fp4" else NF4_THRESHOLDS.split()
    return [float(np.float32(at)) for at in both]


def tree_code(name: str, x: float) -> int:
    """The code of one value by the published comparisons."""
    if name == "nf4":
        return sum(x > at for at in thresholds(name))
    over = sum(abs(x) > float(np.float32(at)) for at in FP4_THRESHOLDS)
    return FP4_CODES[over] + (8 if x < 0 else 0)


def hard_points(name: str, dtype: torch.dtype) -> Tensor:
    at = torch.tensor([*thresholds(name), 0.0, 1.0, -1.0], dtype=torch.float64).to(dtype)
    ends = [torch.full((), end, dtype=dtype) for end in (-math.inf, math.inf)]
    few = torch.tensor([0.0, -0.0, 1e-45, -1e-45, 3e38, -3e38, math.inf, -math.inf], dtype=dtype)
    draw = torch.randn(3000, generator=torch.Generator().manual_seed(0), dtype=dtype) * 0.4
    return torch.cat([at, *(torch.nextafter(at, end) for end in ends), few, draw])


def test_nf4_values() -> None:
    values = Codebook("nf4").values
    assert values.tolist() == [float(value) for value in NF4_VALUES.split()]
    # QLoRA: quantiles of a normal, one more on the positive side, scaled to 1.
    normal, offset = statistics.NormalDist(), 0.9677083
    positive = [normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 9)[:-1]]
    negative = [-normal.inv_cdf(p) for p in np.linspace(offset, 0.5, 8)[:-1]]
    derived = np.sort([*positive, 0.0, *negative]) / max(positive)
    np.testing.assert_allclose(values.numpy(), derived, atol=3e-7)


def test_fp4_values() -> None:
    values = Codebook("fp4").values
    expected = torch.tensor([*FP4_MAGNITUDES, *(-value for value in FP4_MAGNITUDES)])
    assert torch.equal(values, expected)
    assert bool(torch.signbit(values[8]))
    twelfths = torch.tensor([0, 1 / 16, 8, 12, 4, 6, 2, 3]) / 12
    torch.testing.assert_close(values[:8], twelfths, rtol=2e-7, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", CODEBOOKS)
def test_codes_are_those_of_the_published_trees(name: str, dtype: torch.dtype) -> None:
    book, y = Codebook(name), hard_points(name, dtype)
    codes = book.encode(y)
    assert codes.dtype == torch.uint8
    assert codes.tolist() == [tree_code(name, x) for x in y.tolist()]
    decoded = book.decode(codes)
    assert decoded.dtype == torch.float32
    assert torch.equal(decoded, book.values[codes.long()])
    rounded = book.round(y)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, decoded.to(dtype))


@pytest.mark.parametrize("name", CODEBOOKS)
def test_codes_are_nearest(name: str) -> None:
    book = Codebook(name)
    y = torch.linspace(-1.2, 1.2, 4001, dtype=torch.float64)
    least = (y[:, None] - book.values.double()).abs().amin(1)
    # fp4's thresholds as published are the midpoints to seven digits or fewer.
    torch.testing.assert_close((y - book.round(y)).abs(), least, rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_every_code_comes_back(name: str) -> None:
    book = Codebook(name)
    codes = torch.arange(16, dtype=torch.uint8)
    expected = codes.clone()
    if name == "fp4":
        expected[8] = 0  # negative zero is what tiny negative values become; -0.0 itself is 0
    assert torch.equal(book.encode(book.decode(codes)), expected)


@pytest.mark.parametrize("name", CODEBOOKS)
def test_shapes_strides_and_properties(name: str) -> None:
    book = Codebook(name)
    y = torch.linspace(-1, 1, 24).view(4, 6)
    assert torch.equal(book.encode(y.t()), book.encode(y).t())
    assert torch.equal(book.decode(book.encode(y).t()), book.round(y).t())
    assert book.encode(torch.zeros(2, 0)).shape == (2, 0)
    assert book.round(torch.tensor(0.3)).shape == ()
    assert (book.bits, book.storage, str(book)) == (4, torch.uint8, name)
    assert (book.largest, book.emax, book.mantissa_bits, book.has_nan) == (1.0, 0, 0, False)
    assert book.with_bits(4) == book


@pytest.mark.parametrize("name", CODEBOOKS)
def test_errors(name: str) -> None:
    book = Codebook(name)
    with pytest.raises(SpecError, match=f"{name} has no nan.*find its source"):
        book.encode(torch.tensor([0.0, math.nan]))
    assert book.round(torch.tensor([1.0, math.nan])).isnan().tolist() == [False, True]
    with pytest.raises(SpecError, match="bits=3 does not apply"):
        book.with_bits(3)
    with pytest.raises(SpecError, match=r"not torch\.float16"):
        book.encode(torch.ones(1, dtype=torch.float16))
    with pytest.raises(SpecError, match=r"unknown codebook 'nf3'; use nf4 or fp4"):
        Codebook("nf3")
