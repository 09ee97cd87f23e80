"""Small floats against ml_dtypes where it has the type, and against an enumeration of the values for all of them."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import float_element
from qcompile.numerics.float_element import FloatElement, parse_float

PEERS = {
    "e4m3fn": ml_dtypes.float8_e4m3fn,
    "e4m3fnuz": ml_dtypes.float8_e4m3fnuz,
    "e5m2": ml_dtypes.float8_e5m2,
    "e5m2fnuz": ml_dtypes.float8_e5m2fnuz,
    "e2m3": ml_dtypes.float6_e2m3fn,
    "e3m2": ml_dtypes.float6_e3m2fn,
    "e2m1": ml_dtypes.float4_e2m1fn,
}
SHAPES = [(x, y) for x in range(1, 8) for y in range(8 - x)]
EVERY = [FloatElement(x, y, flavour) for x, y in SHAPES for flavour in ("finite", "fnuz")]
EVERY += [FloatElement(4, 3, "ocp"), FloatElement(5, 2, "ocp")]


def element(word: str) -> FloatElement:
    found = parse_float(word)
    assert found is not None
    return found


def enumerate_values(e: FloatElement) -> NDArray[np.float64]:
    """The finite values of the codes from 0 up to the sign bit, from the definition."""
    bias = 2 ** (e.exponent - 1) - (0 if e.flavour == "fnuz" else 1)
    values = []
    for field in range(2**e.exponent):
        for fraction in range(2**e.mantissa):
            if field == 0:
                values.append(2.0 ** (1 - bias) * (fraction / 2**e.mantissa))
            else:
                values.append(2.0 ** (field - bias) * (1 + fraction / 2**e.mantissa))
    unused = {4: 1, 5: 4}[e.exponent] if e.flavour == "ocp" else 0
    return np.array(values[: len(values) - unused])


def nearest_codes(e: FloatElement, y: NDArray[np.float64]) -> NDArray[np.uint8]:
    """Slow and plain: count the midpoints below, settle ties by the even code. Compares only, so nothing rounds."""
    values = enumerate_values(e)
    midpoints = (values[1:] + values[:-1]) / 2
    below = np.searchsorted(midpoints, np.abs(y), side="left")
    tie = np.append(midpoints, np.inf)[below] == np.abs(y)
    code = np.where(np.isinf(y), len(midpoints), below + (tie & (below % 2 == 1)))
    sign = np.where(np.signbit(y), 2 ** (e.bits - 1), 0)
    if e.flavour == "fnuz":
        sign = np.where(code == 0, 0, sign)
    return (code + sign).astype(np.uint8)


def hard_points(e: FloatElement, dtype: torch.dtype) -> Tensor:
    """Values, midpoints, their neighbours in `dtype`, float32 subnormals, zeros, infinities, huge and random ones."""
    values = torch.from_numpy(enumerate_values(e))
    points = torch.cat([values, (values[1:] + values[:-1]) / 2]).to(dtype)
    zero, infinity = torch.zeros((), dtype=dtype), torch.full((), math.inf, dtype=dtype)
    points = torch.cat([points, torch.nextafter(points, zero), torch.nextafter(points, infinity)])
    draw = torch.Generator().manual_seed(e.bits)
    binades = torch.randint(-150, 128, (2000,), generator=draw).double()
    wide = (torch.rand(2000, generator=draw, dtype=torch.float64) + 1) * 2.0**binades
    near = torch.randn(2000, generator=draw, dtype=torch.float64) * e.largest / 2
    few = torch.tensor([0.0, 1e-45, 1e-40, 1.1754944e-38, 3e38, math.inf, e.largest * 1.001, e.largest * 2])
    points = torch.cat([points, wide.to(dtype), near.to(dtype), few.to(dtype)])
    return torch.cat([points, -points])


def random_patterns(count: int) -> Tensor:
    bits = torch.randint(-(2**31), 2**31, (count,), generator=torch.Generator().manual_seed(0))
    return bits.to(torch.int32).view(torch.float32)


def same_values(a: Tensor, b: Tensor) -> bool:
    """Equal, nan to nan, the sign of zero included."""
    same = (a == b) & (torch.signbit(a) == torch.signbit(b)) | (a.isnan() & b.isnan())
    return bool(same.all())


@pytest.mark.parametrize("word", PEERS)
def test_decodes_every_code_as_ml_dtypes(word: str) -> None:
    e = element(word)
    codes = np.arange(2**e.bits, dtype=np.uint8)
    expected = torch.from_numpy(codes.view(PEERS[word]).astype(np.float32))
    assert same_values(e.values, expected)
    assert same_values(e.decode(torch.from_numpy(codes)), expected)
    finite = torch.from_numpy(codes)[expected.isfinite()]
    assert same_values(e.decode(finite), expected[expected.isfinite()])
    assert torch.equal(e.encode(expected[expected.isfinite()]), finite)
    for code in codes:
        assert same_values(e.decode(torch.tensor([code])), expected[code : int(code) + 1])
    assert e.largest == expected[expected.isfinite()].max().item()
    assert e.smallest == expected[expected > 0].min().item()


@pytest.mark.parametrize("word", PEERS)
def test_encodes_as_ml_dtypes_once_saturated(word: str) -> None:
    e = element(word)
    y = torch.cat([hard_points(e, torch.float32), random_patterns(200_000)])
    y = y[~y.isnan()]
    saturated = np.clip(y.numpy(), -np.float32(e.largest), np.float32(e.largest))
    expected = torch.from_numpy(saturated.astype(PEERS[word]).view(np.uint8))
    assert torch.equal(e.encode(y), expected)
    assert torch.equal(e.encode(y.double()), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("e", EVERY, ids=str)
def test_every_shape_takes_the_nearest_value_and_ties_the_even_code(e: FloatElement, dtype: torch.dtype) -> None:
    y = hard_points(e, dtype)
    expected = torch.from_numpy(nearest_codes(e, y.double().numpy()))
    codes = e.encode(y)
    assert codes.dtype == e.storage
    assert torch.equal(codes, expected)
    magnitudes = torch.from_numpy(enumerate_values(e)).float()
    magnitude = magnitudes[(expected & (2 ** (e.bits - 1) - 1)).long()]
    assert torch.equal(e.decode(codes), torch.where(expected >= 2 ** (e.bits - 1), -magnitude, magnitude))
    rounded = e.round(y)
    assert rounded.dtype == dtype
    assert torch.equal(rounded, e.decode(codes).to(dtype))


@pytest.mark.parametrize("e", EVERY, ids=str)
def test_every_code_comes_back(e: FloatElement) -> None:
    codes = torch.arange(2**e.bits, dtype=torch.uint8)
    finite = codes[e.values.isfinite()]
    assert torch.equal(e.encode(e.decode(finite)), finite)
    assert same_values(e.decode(codes), e.values)
    assert e.has_nan == bool(e.values.isnan().any())
    assert e.largest == e.values[finite.long()].max().item()
    assert 2.0**e.emax <= e.largest < 2.0 ** (e.emax + 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("e", EVERY, ids=str)
def test_nan_is_a_nan_code_or_an_error(e: FloatElement, dtype: torch.dtype) -> None:
    y = torch.tensor([[1.0, math.nan, -math.nan], [math.inf, -math.inf, 0.5]], dtype=dtype)
    rounded = e.round(y)
    assert torch.equal(rounded.isnan(), y.isnan())
    if not e.has_nan:
        with pytest.raises(SpecError, match=r"has no nan.*find its source"):
            e.encode(y)
        return
    decoded = e.decode(e.encode(y))
    assert torch.equal(decoded.isnan(), y.isnan())
    assert decoded[1, 0] == e.largest
    assert decoded[1, 1] == -e.largest
    assert torch.equal(rounded.nan_to_num(7.0), decoded.nan_to_num(7.0).to(dtype))


def test_a_float64_is_rounded_once() -> None:
    e = element("e2m1")
    above = 2.5 + 2.0**-40  # float32 would take it to the tie at 2.5, and that to 2
    assert e.decode(e.encode(torch.tensor([above], dtype=torch.float64))).item() == 3.0
    assert e.round(torch.tensor([above], dtype=torch.float64)).item() == 3.0


@pytest.mark.parametrize(
    "word", ["e2m1", "e2m3", "e3m2", "e4m3fn", "e5m2", "e4m3fnuz", "e5m2(plain)", "e3m0", "e2m1fnuz"]
)
def test_shapes_strides_and_inputs_are_respected(word: str) -> None:
    e = element(word)
    y = torch.linspace(-1, 1, 96).view(4, 6, 4) * e.largest
    before = y.clone()
    flat = e.encode(y.reshape(-1))
    for view, expected in ((y, flat.view(4, 6, 4)), (y.transpose(0, 1)[::2], flat.view(4, 6, 4).transpose(0, 1)[::2])):
        codes = e.encode(view)
        assert torch.equal(codes, expected)
        assert torch.equal(e.round(view), e.decode(codes))
        assert torch.equal(e.decode(expected), e.decode(codes))
    assert torch.equal(y, before)
    assert torch.equal(e.decode(flat), e.decode(flat.clone()))
    for shape in ((0,), (3, 0), ()):
        empty = torch.zeros(shape)
        assert e.encode(empty).shape == e.round(empty).shape == e.decode(e.encode(empty)).shape == empty.shape


def test_tables_made_in_inference_mode_serve_training() -> None:
    float_element._values.cache_clear()
    with torch.inference_mode():
        element("e3m2").values  # noqa: B018
    weight = torch.ones(8, requires_grad=True)
    values = element("e3m2").values[:8]
    (gradient,) = torch.autograd.grad((values * weight).sum(), weight)
    assert torch.equal(gradient, values)


@pytest.mark.parametrize("word", ["e2m1", "e3m2", "e4m3fn", "e4m3(plain)"])
def test_encodes_what_is_trained(word: str) -> None:
    e = element(word)
    weight = torch.ones(3, requires_grad=True)
    assert torch.equal(e.decode(e.encode(weight)), torch.ones(3))


@pytest.mark.parametrize(
    ("word", "largest", "smallest", "emax", "mantissa_bits"),
    [
        ("e4m3fn", 448.0, 2.0**-9, 8, 3),
        ("e5m2", 57344.0, 2.0**-16, 15, 2),
        ("e4m3fnuz", 240.0, 2.0**-10, 7, 3),
        ("e5m2fnuz", 57344.0, 2.0**-17, 15, 2),
        ("e2m1", 6.0, 0.5, 2, 1),
        ("e2m3", 7.5, 0.125, 2, 3),
        ("e3m2", 28.0, 0.0625, 4, 2),
        ("e4m3(plain)", 480.0, 2.0**-9, 8, 3),
        ("e5m2(plain)", 114688.0, 2.0**-16, 16, 2),
        ("e3m0", 16.0, 0.25, 4, 0),
    ],
)
def test_named_formats(word: str, largest: float, smallest: float, emax: int, mantissa_bits: int) -> None:
    e = element(word)
    assert (e.largest, e.smallest, e.emax, e.mantissa_bits) == (largest, smallest, emax, mantissa_bits)
    assert e.storage == torch.uint8
    assert e.bits == int(word[1]) + int(word[3]) + 1


def test_infinity_codes_of_e5m2() -> None:
    e = element("e5m2")
    assert e.decode(torch.tensor([0x7C, 0xFC], dtype=torch.uint8)).tolist() == [math.inf, -math.inf]
    assert e.encode(torch.tensor([math.inf, -math.inf])).tolist() == [0x7B, 0xFB]


@pytest.mark.parametrize("e", EVERY, ids=str)
def test_words_read_back(e: FloatElement) -> None:
    assert parse_float(str(e)) == e


def test_words() -> None:
    assert parse_float("e4m3") == parse_float("e4m3fn") == FloatElement(4, 3, "ocp")
    assert parse_float("e5m2") == FloatElement(5, 2, "ocp")
    assert parse_float("e5m2(plain)") == FloatElement(5, 2, "finite")
    assert parse_float("e2m1") == FloatElement(2, 1)
    assert str(FloatElement(4, 3, "fnuz")) == "e4m3fnuz"
    for word in ("int4", "nf4", "e4m", "e4m3x", "e2m1 ", "fe2m1", "e-1m3"):
        assert parse_float(word) is None


@pytest.mark.parametrize(
    ("word", "reason"),
    [
        ("e5m4", "e5m4 has 10 bits.*8 at most; use"),
        ("e8m0", "e8m0 has 9 bits"),
        ("e0m3", "e0m3 needs 1 exponent bit"),
        ("e6m3fnuz", "e6m3 has 10 bits"),
        ("e2m1fn", "there is no e2m1fn.*write e2m1"),
    ],
)
def test_impossible_words(word: str, reason: str) -> None:
    with pytest.raises(SpecError, match=reason):
        parse_float(word)


def test_impossible_elements() -> None:
    with pytest.raises(SpecError, match="only e4m3 and e5m2"):
        FloatElement(2, 1, "ocp")
    with pytest.raises(SpecError, match="unknown flavour 'ieee'"):
        FloatElement(2, 1, "ieee")  # type: ignore[arg-type]
    with pytest.raises(SpecError, match="bits=4 does not apply"):
        element("e4m3fn").with_bits(4)
    assert element("e2m1").with_bits(4) == element("e2m1")
    with pytest.raises(SpecError, match=r"e2m1 is made from float32 or float64, not torch\.float16"):
        element("e2m1").encode(torch.ones(1, dtype=torch.float16))
    with pytest.raises(SpecError, match=r"not torch\.int32"):
        element("e2m1").round(torch.ones(1, dtype=torch.int32))
