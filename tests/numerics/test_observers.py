"""Streaming observers against the same choice made on all data at once."""

from __future__ import annotations

import math

import pytest
import torch

from qcompile.errors import SpecError
from qcompile.numerics import QParams, QuantSpec, choose_qparams, dequantize, quantize, sqnr_db
from qcompile.numerics.fit import Fit
from qcompile.numerics.histogram import FloatHistogram
from qcompile.numerics.observers import Observer

GRANULARITIES = ["tensor", "channel"]
ELEMENTS = ["int8", "int4 signed", "int8 asym", "uint4 asym zero=float", "uint8"]


def batches(count: int = 6, seed: int = 0) -> list[torch.Tensor]:
    """Skewed activations with a few large entries and channels of unlike sizes; lengths differ."""
    generator = torch.Generator().manual_seed(seed)
    size = torch.linspace(0.01, 5, 8)
    made = [torch.randn(2, 40 + 8 * i, 8, generator=generator) for i in range(count)]
    return [(x + 0.3 * x.abs() ** 2) * size for x in made]


def observed(spec: QuantSpec, xs: list[torch.Tensor]) -> Observer:
    observer = Observer(spec)
    for x in xs:
        observer.observe(x)
    return observer


def together(xs: list[torch.Tensor]) -> torch.Tensor:
    return torch.cat([x.reshape(1, -1, x.shape[-1]) for x in xs], dim=1)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", ELEMENTS)
def test_extremes_are_exact(text: str, granularity: str) -> None:
    spec = QuantSpec.parse(f"{text} {granularity} static")
    scale, zero, _ = observed(spec, batches()).qparams()
    want_scale, want_zero, _ = choose_qparams(together(batches()), spec)
    assert torch.equal(scale, want_scale)
    assert (zero is None) == (want_zero is None)
    assert zero is None or want_zero is None or torch.equal(zero, want_zero)


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", ELEMENTS)
@pytest.mark.parametrize("percent", [60, 90, 99, 99.99, 100])
def test_percentiles_are_within_the_width_of_a_bin(text: str, granularity: str, percent: float) -> None:
    spec = QuantSpec.parse(f"{text} {granularity} static percentile={percent}")
    scale, *_ = observed(spec, batches()).qparams()
    want, *_ = choose_qparams(together(batches()), spec)
    width = 2.0**-7 if granularity == "tensor" else 2.0**-5
    assert bool(((scale / want - 1).abs() <= width).all())
    if percent == 100:
        assert torch.allclose(scale, want, rtol=1e-6)


def test_rank_of_a_percentile_is_off_by_less_than_one_bin() -> None:
    x = together(batches()).abs().flatten()
    spec = QuantSpec.parse("int8 static percentile=99.5")
    scale, *_ = observed(spec, batches()).qparams()
    rank = int((x <= scale.item() * 127.5).sum())
    bin_width = scale.item() * 127.5 * 2.0**-7
    in_a_bin = int(((x - scale.item() * 127.5).abs() <= bin_width).sum())
    assert abs(rank - 0.995 * x.numel()) <= in_a_bin + 1


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", [*ELEMENTS, "int4 scale=pow2", "int3 half"])
@pytest.mark.parametrize("norm", ["mse", "mse=2.4"])
def test_mse_is_as_good_as_on_all_data(text: str, granularity: str, norm: str) -> None:
    spec = QuantSpec.parse(f"{text} {granularity} static {norm}")
    x = together(batches())
    if not spec.signed and spec.symmetric:
        x = x.abs()
    streamed = observed(spec, [b.abs() if not spec.signed and spec.symmetric else b for b in batches()]).qparams()
    exact = choose_qparams(x, spec)

    def db(params: QParams) -> float:
        scale, zero, _ = params
        return sqnr_db(x, dequantize(quantize(x, scale, zero, spec), scale, zero, spec))

    assert db(streamed) >= db(exact) - 0.15


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("text", ["int8", "int8 asym minmax", "int8 percentile=99", "int4 mse", "uint4 asym mse"])
def test_order_and_merging_change_nothing(text: str, granularity: str) -> None:
    spec = QuantSpec.parse(f"{text} {granularity} static")
    xs = batches()
    whole = observed(spec, xs).qparams()
    left, right, nothing = observed(spec, xs[4:]), observed(spec, xs[:4][::-1]), Observer(spec)
    nothing.merge(left)
    nothing.merge(right)
    nothing.merge(Observer(spec))
    for other in (nothing.qparams(), observed(spec, xs[::-1]).qparams()):
        assert torch.equal(whole[0], other[0])
        assert whole[1] is None or torch.equal(whole[1], other[1])
    assert left.qparams() is not None  # what was merged in is left as it was
    assert torch.equal(left.qparams()[0], observed(spec, xs[4:]).qparams()[0])


def test_bins_hold_what_their_edges_say() -> None:
    exponents = torch.arange(-31, 31, dtype=torch.float64)
    x = torch.cat([s * m * torch.exp2(exponents) for s in (1, -1) for m in (1.0, 1.126, 1.5, 1.999)]).to(torch.float32)
    histogram = FloatHistogram(1, 3, x.device)
    edges = histogram.edges()
    assert bool((edges.diff() > 0).all())
    for value in x:
        before = histogram.counts.clone()
        histogram.add(value.reshape(1, 1))
        place = int((histogram.counts - before).argmax())
        low, high = edges[place].item(), edges[place + 1].item()
        assert low <= value.item() <= high
        assert high - low <= abs(value.item()) * 2.0**-3


@pytest.mark.parametrize("text", ["int2 signed", "int3 half", "int4 asym", "uint3 asym zero=float", "uint2", "ternary"])
@pytest.mark.parametrize("factor", [0.5, 1.0, 1.3])
@pytest.mark.parametrize("sign", [1, -1])
def test_error_of_a_histogram_is_that_of_its_entries(text: str, factor: float, sign: int) -> None:
    spec = QuantSpec.parse(f"{text} channel")
    x = sign * torch.stack([torch.linspace(-0.99, 1, 5000), torch.linspace(-2, 7, 5000), torch.linspace(3, 3.5, 5000)])
    low, high = x.amin(1), x.amax(1)
    scale, zero, _ = Fit.start(low * factor, high * factor, spec, x.dtype, (), (1,)).stored((), (1,))
    histogram = FloatHistogram(3, 7, x.device)
    histogram.add(x)
    column = None if zero is None else zero.unsqueeze(1)
    restored = dequantize(quantize(x, scale.unsqueeze(1), column, spec), scale.unsqueeze(1), column, spec)
    for norm in (2.0, 3.0):
        want = ((restored - x).abs().double() ** norm).sum(1)
        assert torch.allclose(histogram.error(scale, zero, spec, norm, low, high), want, rtol=0.02)


@pytest.mark.parametrize("text", ["int8 percentile=99", "int8 mse", "int8 asym mse", "int8 asym percentile=99"])
@pytest.mark.parametrize("value", [0.0, 3.0, -3.0, 1e-30, 1e30, -65504.0])
def test_constant_data(text: str, value: float) -> None:
    spec = QuantSpec.parse(f"{text} tensor static")
    x = torch.full((2, 3, 4), value)
    scale, zero, _ = observed(spec, [x, x]).qparams()
    restored = dequantize(quantize(x, scale, zero, spec), scale, zero, spec)
    assert torch.allclose(restored, x, rtol=0.01)


def test_half_precision_and_empty_batches() -> None:
    spec = QuantSpec.parse("int8 static")
    xs = [x.to(torch.bfloat16) for x in batches()]
    scale, *_ = observed(spec, [torch.empty(2, 0, 8, dtype=torch.bfloat16), *xs]).qparams()
    assert torch.equal(scale, choose_qparams(together(xs), spec)[0])


def test_what_cannot_be_observed_is_refused() -> None:
    with pytest.raises(SpecError, match="use tensor, channel or dynamic"):
        Observer(QuantSpec.parse("int8 dynamic"))
    spec = QuantSpec.parse("int8 channel static mse")
    observer = Observer(spec)
    with pytest.raises(SpecError, match="calibration batches"):
        observer.qparams()
    observer.observe(torch.randn(2, 3, 4))
    before = observer.qparams()[0]
    with pytest.raises(SpecError, match="one observer per tensor"):
        observer.observe(torch.randn(2, 3, 5))
    for bad in (math.nan, math.inf):
        with pytest.raises(SpecError, match="nan or infinity"):
            observer.observe(torch.full((2, 3, 4), bad))
    assert torch.equal(observer.qparams()[0], before)
    with pytest.raises(SpecError, match="specs must be equal"):
        observer.merge(Observer(QuantSpec.parse("int8 channel static")))
