"""The references themselves: element casts beside ml_dtypes, and block formats beside values worked out by hand."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from oracles import block_formats as oracle
from oracles import codebooks, double_quantization, half_quadratic

CASTS = {
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}


def block(*entries: float, size: int = 32) -> np.ndarray:
    return np.array([*entries, *[0.0] * (size - len(entries))], dtype=np.float32)


@pytest.mark.parametrize("name", CASTS)
def test_encode_is_the_cast(name: str) -> None:
    element, rng = oracle.ELEMENTS[name], np.random.default_rng(0)
    bits = rng.integers(0, 2**32, 50_000, dtype=np.uint32).view(np.float32)
    halves = (rng.integers(-4096, 4096, 50_000) / 256 * np.exp2(rng.integers(-16, 12, 50_000))).astype(np.float32)
    y = np.concatenate([bits[~np.isnan(bits)], halves, np.float32([0.0, -0.0, np.inf, -np.inf])])
    codes = oracle.encode(y, element)
    expected = np.clip(y, -element.largest, element.largest).astype(CASTS[name])
    np.testing.assert_array_equal(codes, expected.view(np.uint8))
    np.testing.assert_array_equal(oracle.decode(codes, element), expected.astype(np.float64))


def test_noclip_rounds_once() -> None:
    # 0.25 and a little above it; in float32 the two are one number.
    assert oracle.encode(np.array([0.25, 0.25 + 2.0**-40]), oracle.ELEMENTS["e2m1"]).tolist() == [0, 1]


@pytest.mark.parametrize(
    ("element", "amax", "exponents"),
    [
        ("e2m1", 4.0, {"floor": 0, "even": 0, "ceil": 0, "rceil": 0}),
        ("e2m1", 6.0, {"floor": 0, "even": 0, "ceil": 1, "rceil": 0}),
        ("e2m1", np.nextafter(np.float32(6), np.float32(7)), {"floor": 0, "even": 0, "ceil": 1, "rceil": 1}),
        ("e2m1", 7.0, {"floor": 0, "even": 1, "ceil": 1, "rceil": 1}),
        ("e4m3", 448.0, {"floor": 0, "even": 0, "ceil": 1, "rceil": 0}),
        ("e4m3", 496.0, {"floor": 0, "even": 1, "ceil": 1, "rceil": 1}),
        ("int8", 127 / 64, {"floor": 0, "even": 0, "ceil": 1, "rceil": 0}),
        ("int8", 127.5 / 64, {"floor": 0, "even": 1, "ceil": 1, "rceil": 1}),
    ],
)
def test_scale_rules(element: str, amax: float, exponents: dict[str, int]) -> None:
    for rule, exponent in exponents.items():
        assert oracle.mx(block(-amax, amax / 3), element, rule).scale == 127 + exponent, rule


def test_one_block_of_mxfp4() -> None:
    found = oracle.mx(block(5.0, -2.5, 3.5, 0.25, -0.2, -0.0, 7.9), "e2m1")
    assert found.scale == 127
    assert found.codes[:7].tolist() == [6, 12, 6, 0, 8, 8, 7]
    assert found.values[:7].tolist() == [4, -2, 4, 0, 0, 0, 6]
    assert oracle.mx(block(7.9), "e2m1", "noclip").values[0] == 8
    assert oracle.mx(block(7.9, 7.9), "e2m1", "mse").scale == 128


def test_the_ends_of_the_range() -> None:
    zero = oracle.mx(block(), "e2m1")
    assert (zero.scale, zero.codes.any()) == (0, False)
    tiny = oracle.mx(block(2.0**-127, -(2.0**-126), 2.0**-149), "e2m1")
    assert tiny.scale == 0
    assert tiny.values[:3].tolist() == [2.0**-127, -(2.0**-126), 0]
    for bad in (np.nan, np.inf, -np.inf):
        for found in (oracle.mx(block(bad, 1), "e4m3"), oracle.bfp(block(bad, 1)), oracle.microexponent(block(bad), 5)):
            assert found.scale == 255
            assert np.isnan(found.values).all()
        assert oracle.nvfp4(block(bad, 1, size=16)).scale == 0x7F
    huge = oracle.mx(block(1.99 * 2.0**127), "int8", "ceil")
    assert (huge.scale, huge.codes[0]) == (254, 127)


def test_block_floating_point() -> None:
    assert oracle.bfp(block(1.0, size=8)).scale == 127 - 6
    down, up = oracle.bfp(block(-1.999, size=8)), oracle.bfp(block(1.999, size=8))
    assert (down.scale, down.codes[0]) == (121, -128)
    assert (up.scale, up.codes[0]) == (122, 64)


def test_microexponents() -> None:
    found = oracle.microexponent(block(1.5, 0.1, 0.99, -0.3, 1.0, 0.2, size=16), 5)
    assert found.scale == 127
    assert found.micro is not None
    assert found.micro.tolist() == [0, 1, 0, 1, 1, 1, 1, 1]
    assert found.codes[:6].tolist() == [12, 1, 15, -5, 8, 2]
    assert found.values[:4].tolist() == [1.5, 0.125, 15 / 16, -5 / 16]


def test_nvfp4_search() -> None:
    x = oracle.make_blocks("gaussian", 0, 2000, 16)
    plain, found = oracle.nvfp4(x), oracle.nvfp4(x, search=True)
    assert plain.outer == np.float32(2688) / np.abs(x).max()
    assert 0.0085 < oracle.relative_error(x, plain.values) < 0.0095
    assert 0.0063 < oracle.relative_error(x, found.values) < 0.0069
    assert oracle.nvfp4(np.zeros((1, 16), np.float32)).scale == 1


@pytest.mark.parametrize("share", [1.0, 1e-5])  # the second one's scales are subnormal
def test_nvfp4_search_is_the_best_of_all_scales(share: float) -> None:
    x = oracle.make_blocks("laplace", 0, 64, 16)
    x[1:] *= np.float32(share)
    found = oracle.nvfp4(x, search=True, window=126)
    assert found.outer is not None
    wide, least = x.astype(np.float64), np.full(len(x), np.inf)
    for scale in np.arange(1, 127, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float32):
        step = scale / found.outer
        codes = np.clip(x / step, -6, 6).astype(ml_dtypes.float4_e2m1fn)
        least = np.minimum(least, np.sum((wide - codes.astype(np.float32) * step) ** 2, axis=1))
    np.testing.assert_array_equal(np.sum((wide - found.values) ** 2, axis=1), least)
    usual = oracle.nvfp4(x, search=True)
    np.testing.assert_array_equal(np.sum((wide - usual.values) ** 2, axis=1), least)


def test_codebooks() -> None:
    scale, codes, values = codebooks.quantize(block(-2.0, 1.0, 0.1, size=64), "nf4")
    assert scale == 2
    assert codes[:4].tolist() == [0, 12, 8, 7]
    assert values[0] == -2


def test_quantized_scales_read_back_within_half_a_step() -> None:
    scales = np.abs(np.random.default_rng(0).standard_normal((3, 200)).astype(np.float32))
    found = double_quantization.quantize_scales(scales, 6)
    assert len(found.step) == 3
    steps = np.repeat(found.step, 256)[:600].reshape(3, 200)
    assert (np.abs(found.values - scales) <= 0.501 * steps).all()
    assert double_quantization.quantize_scales(np.float32([2, 2]), 8).values.tolist() == [2, 2]


def test_half_quadratic_lowers_the_error() -> None:
    x = np.random.default_rng(1).standard_normal(64).astype(np.float32)
    scale = float(x.max() - x.min()) / 3
    found = half_quadratic.hqq_group(x, scale, float(-x.min()) / scale, bits=2)
    assert min(found.errors) < found.errors[0]
    assert np.mean(np.abs(x - found.values)) == pytest.approx(min(found.errors))
