"""Conventions, observers and degenerate inputs."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import integer_quantization as oracle

from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec, choose_qparams, dequantize, quantize, sqnr_db
from qcompile.numerics.fit import Fit
from qcompile.numerics.search import candidates

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def scale_of(text: str, values: list[float]) -> float:
    scale, zero, _ = choose_qparams(torch.tensor([values]), QuantSpec.parse(text))
    assert zero is None
    return scale.item()


def test_the_four_symmetric_ranges() -> None:
    assert scale_of("int4 narrow", [-7.0, 3.0]) == 1.0
    assert scale_of("int4 half", [-7.5, 3.0]) == 1.0
    assert scale_of("int4 full", [-8.0, 3.0]) == 1.0
    assert scale_of("int4 full", [8.0, 3.0]) == 1.0
    assert scale_of("int4 signed", [-8.0, 3.0]) == 1.0
    assert scale_of("int4 signed", [8.0, -3.0]) == -1.0
    assert scale_of("int4 signed", [8.0, -8.0]) == 1.0
    assert scale_of("uint4", [15.0, -20.0]) == 1.0
    assert scale_of("ternary", [3.0, -5.0]) == 5.0


def test_asymmetric_ranges_hold_zero() -> None:
    for values, want in (([3.0, 15.0], (1.0, -8)), ([-15.0, -3.0], (1.0, 7)), ([-5.0, 10.0], (1.0, -3))):
        scale, zero, _ = choose_qparams(torch.tensor([values]), QuantSpec.parse("int4 asym"))
        assert zero is not None
        assert (scale.item(), zero.item()) == want
        assert zero.dtype == torch.int8
    scale, zero, _ = choose_qparams(torch.tensor([[-4.75, 10.25]]), QuantSpec.parse("uint4 asym zero=float"))
    assert zero is not None
    assert (scale.item(), zero.item()) == (1.0, 4.75)


@pytest.mark.parametrize("group", [32, 128])
def test_order_of_conventions_on_gaussian_weights(group: int) -> None:
    x = gaussian(128, 1024)

    def db(text: str) -> float:
        return sqnr_db(x, QuantSpec.parse(f"{text} group={group}").quantize(x).dequantize())

    for bits in (2, 3, 4):
        order = [db(f"int{bits} {word}") for word in ("narrow", "half", "full", "signed", "signed mse")]
        assert order == sorted(order)
        assert db(f"int{bits} asym mse") > db(f"int{bits} asym")
        assert db(f"int{bits} asym zero=float") > db(f"int{bits} asym")
    assert db("int3") - db("int3 narrow") > 2  # the choice of convention alone, in dB
    assert db("int4") - db("int4 narrow") > 1
    assert db("int8 scale=pow2") > db("int8 scale=pow2(midmax)") + 10


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_power_of_two_scales_over_all_exponents(dtype: torch.dtype) -> None:
    exponents = range(-126, 124)
    mantissas = (1, 1.41, 1.42, 1.5, 1.99)
    high = torch.tensor([[m * 2.0**e] for e in exponents for m in mantissas], dtype=dtype)
    rules = {"": (0, 1, 1, 1, 1), "(floor)": (0,) * 5, "(round)": (0, 0, 0, 1, 1), "(midmax)": (0, 0, 1, 1, 1)}
    for rule, ups in rules.items():
        spec = QuantSpec.parse(f"uint1 scale=pow2{rule}")
        scale = Fit.start(torch.zeros_like(high), high, spec, dtype, (), (1, 1)).units
        assert scale.flatten().tolist() == [2.0 ** (e + up) for e in exponents for up in ups]
    spec = QuantSpec.parse("int4 scale=pow2")
    scale, *_ = choose_qparams(torch.tensor([[5.0], [-5.0]]), spec)
    assert scale.flatten().tolist() == [1.0, 1.0]
    with pytest.raises(SpecError, match="scales with a sign"):
        QuantSpec.parse("int4 signed scale=pow2")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "text", ["int4", "int4 half scale=f16", "int8 asym", "uint4 asym zero=float scale=bf16", "uint4", "ternary"]
)
@pytest.mark.parametrize("extra", ["", "percentile=99", "mse"])
def test_degenerate_tensors(text: str, extra: str, dtype: torch.dtype) -> None:
    spec = QuantSpec.parse(f"{text} {extra} tensor")
    zeros = spec.quantize(torch.zeros(3, 4, dtype=dtype))
    assert zeros.scale.item() == 1
    assert not zeros.dequantize().any()
    largest = torch.finfo(dtype).max
    tiny = torch.finfo(dtype).smallest_normal / 4
    for values in ([3.0], [-3.0], [tiny, -tiny], [largest, -largest], [largest, tiny], [0.0, -largest]):
        x = torch.tensor(values, dtype=dtype)
        q = spec.quantize(x)
        assert bool(torch.isfinite(q.scale).all())
        assert q.scale.item() != 0
        assert bool(torch.isfinite(q.dequantize(dtype)).all()) or torch.finfo(q.scale.dtype).max < largest
        if spec.zero != "float":  # a float zero-point does not hold 0 exactly
            assert bool((q.dequantize(torch.float64).sign() * x.to(torch.float64).sign() >= 0).all())


@pytest.mark.parametrize("text", ["int4 tensor", "int8 asym tensor mse", "int4 tensor percentile"])
def test_a_tensor_without_axes(text: str) -> None:
    q = QuantSpec.parse(text).quantize(torch.tensor(3.0))
    assert q.codes.shape == q.scale.shape == ()
    assert q.dequantize().item() == pytest.approx(3.0)


@pytest.mark.parametrize("shape", [(0, 8), (4, 0), (0, 0), (0,), (2, 0, 8)])
@pytest.mark.parametrize("granularity", ["tensor", "channel", "group=4", "token"])
@pytest.mark.parametrize("text", ["int4", "int4 asym mse", "int8 percentile"])
def test_empty_tensors(text: str, granularity: str, shape: tuple[int, ...]) -> None:
    spec = QuantSpec.parse(f"{text} {granularity}")
    q = spec.quantize(torch.empty(shape))
    assert q.scale.shape == spec.scale_shape(shape)
    assert bool((q.scale == 1).all())
    assert q.codes.shape == q.dequantize().shape == shape


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "text", ["int4 group=2", "int8 asym", "int4 group=1", "int8 mse", "int8 percentile", "uint8 tensor"]
)
def test_nan_and_infinity_are_refused(text: str, bad: float) -> None:
    x = gaussian(4, 4)
    x[2, 1] = bad
    with pytest.raises(SpecError, match="nan or infinity"):
        choose_qparams(x, QuantSpec.parse(text))


def test_quantize_saturates_infinity_and_refuses_nan() -> None:
    spec = QuantSpec.parse("int8 static")
    one = torch.ones(1)
    assert quantize(torch.tensor([math.inf, -math.inf, 300.0]), one, None, spec).tolist() == [127, -128, 127]
    with pytest.raises(SpecError, match="holds nan"):
        quantize(torch.tensor([1.0, math.nan]), one, None, spec)


def test_operands_that_do_not_fit_are_refused() -> None:
    x, sym, asym = gaussian(4, 6), QuantSpec.parse("int4"), QuantSpec.parse("int4 asym")
    scale = torch.ones(4, 1)
    for wrong in (torch.ones(4), torch.ones(3, 1), torch.ones(8, 1), torch.ones(0, 1), torch.ones(1, 4, 1)):
        with pytest.raises(SpecError, match="does not fit"):
            quantize(x, wrong, None, sym)
    with pytest.raises(SpecError, match="has no zero-point"):
        quantize(x, scale, torch.zeros(4, 1), sym)
    with pytest.raises(SpecError, match="needs a zero-point"):
        dequantize(torch.zeros(4, 6, dtype=torch.int8), scale, None, asym)
    with pytest.raises(SpecError, match="must be equal"):
        quantize(x, scale, torch.zeros(1, 1), asym)
    with pytest.raises(SpecError, match="float dtype"):
        choose_qparams(torch.ones(4, 4, dtype=torch.int32), sym)


def test_codes_are_chosen_against_the_stored_scale() -> None:
    x = gaussian(64, 256)
    spec = QuantSpec.parse("int8 group=32 scale=bf16")
    q = spec.quantize(x)
    assert q.scale.dtype == torch.bfloat16
    wide = q.scale.to(torch.float32).repeat_interleave(32, 1)
    assert torch.equal(q.codes.to(torch.float32), (x / wide).round().clamp(-128, 127))


def test_half_precision_input_is_computed_in_float32() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = gaussian(16, 64).to(dtype)
        for text in ("int4 group=16", "int8 asym mse", "int3 percentile=95"):
            spec = QuantSpec.parse(text)
            half, full = spec.quantize(x), spec.quantize(x.float())
            assert torch.equal(half.scale, full.scale)
            assert torch.equal(half.codes, full.codes)


@settings(max_examples=100, deadline=None)
@given(
    st.floats(51, 100), st.integers(1, 40), st.integers(0, 1000), st.sampled_from(["int8 half", "int8 asym", "uint8"])
)
def test_percentiles_agree_with_a_sort(percent: float, count: int, seed: int, text: str) -> None:
    x = gaussian(2, count, seed=seed).to(torch.float64)
    spec = QuantSpec.parse(f"{text} percentile={percent!r}")
    scale, *_ = choose_qparams(x, spec)
    for row in range(2):
        entries = x[row].tolist()
        if text == "int8 half":
            want = oracle.percentile([abs(v) for v in entries], percent) / 127.5
        elif text == "uint8":
            want = oracle.percentile([max(v, 0.0) for v in entries], percent) / 255
        else:
            high = max(oracle.percentile(entries, percent), 0.0)
            low = min(-oracle.percentile([-v for v in entries], percent), 0.0)
            want = (high - low) / 255
        assert scale[row].item() == pytest.approx(want or 1.0, rel=1e-6)


def test_a_signed_scale_keeps_its_sign_under_percentile() -> None:
    x = torch.cat([torch.full((1, 99), 0.5), torch.tensor([[9.0]])], dim=1)
    scale, *_ = choose_qparams(x, QuantSpec.parse("int4 percentile=90"))
    assert scale.item() == -0.5 / 8


@pytest.mark.parametrize(
    "text", ["int3 group=16", "int4 asym group=16", "uint4 asym zero=float", "int4 half scale=pow2", "int2 mse=3"]
)
def test_mse_takes_the_best_of_its_grid(text: str) -> None:
    x = gaussian(6, 48)
    norm = 3.0 if "mse=3" in text else 2.0
    spec = QuantSpec.parse(text).with_fields({"mse": norm})
    q = spec.quantize(x)
    columns = 48 // q.scale.shape[1]

    def errors(restored: torch.Tensor) -> torch.Tensor:
        return ((restored - x).abs().double() ** norm).reshape(6, -1, columns).sum(-1)

    groups = x.reshape(6, -1, columns)
    tried = []
    for fit in candidates(Fit.start(groups.amin(-1), groups.amax(-1), spec, x.dtype, (), (1, 1))):
        scale, zero, _ = fit.stored((), x.shape)
        tried.append(errors(dequantize(quantize(x, scale, zero, spec), scale, zero, spec)))
    assert torch.allclose(errors(q.dequantize()), torch.stack(tried).amin(0), rtol=1e-5)
    plain = spec.with_fields({"observer": None}).quantize(x)
    assert bool((errors(q.dequantize()) <= errors(plain.dequantize()) * (1 + 1e-6)).all())


def test_sqnr() -> None:
    x = torch.tensor([3.0, 4.0])
    assert sqnr_db(x, x) == math.inf
    assert sqnr_db(x, torch.tensor([3.0, 3.5])) == pytest.approx(20.0)
    assert sqnr_db(torch.zeros(2), torch.ones(2)) == -math.inf
    with pytest.raises(SpecError, match="shapes must match"):
        sqnr_db(x, x[:1])


def test_quantized_tensor_reports_its_bits() -> None:
    q = QuantSpec.parse("int4 asym group=32").quantize(gaussian(8, 64))
    assert q.bits_per_element == 4 + 36 / 32
    assert q.dequantize().dtype == torch.float32
    assert q.dequantize(torch.bfloat16).dtype == torch.bfloat16
