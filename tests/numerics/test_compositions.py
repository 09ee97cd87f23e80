"""Scales of scales, quantized zero-points, values on the way through another element, stacks, casts; hqo; bad data."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import half_quadratic
from oracles.codebooks import quantize as codebook_oracle
from oracles.double_quantization import quantize_scales

from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec, choose_qparams, dequantize, quantize, sqnr_db
from qcompile.numerics.observers import Observer


def gaussian(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 6, 8])
@pytest.mark.parametrize("run", [7, 64, 256])
@pytest.mark.parametrize("element", ["int4", "nf4", "e2m1"])
def test_double_quantized_scales_are_those_of_the_oracle(bits: int, run: int, element: str) -> None:
    x = gaussian(24, 512)
    plain = QuantSpec.parse(f"{element} group=16").quantize(x)
    q = QuantSpec.parse(f"{element} group=16 double={bits}x{run}").quantize(x)
    want = quantize_scales(plain.scale.numpy(), bits, run)
    assert (q.scale.numpy() == want.codes).all()
    assert want.offset is not None
    assert torch.equal(q.parameters["scale_step"], torch.tensor(want.step))
    assert torch.equal(q.parameters["scale_offset"], torch.tensor(want.offset))
    values = torch.tensor(want.values).repeat_interleave(16, 1)
    restored = q.dequantize()
    if element == "int4":
        assert torch.equal(restored, q.codes * values)
    assert float((x - restored).square().sum()) >= float((x - plain.dequantize()).square().sum()) * 0.98


def test_symmetric_double_quantization_never_stores_a_scale_of_zero() -> None:
    x = gaussian(8, 64)
    x[1:] *= 1e-4
    q = QuantSpec.parse("int4 group=8 double=4x64(sym)").quantize(x)
    assert q.scale.dtype == torch.int8
    assert bool((q.scale != 0).all())
    assert list(q.parameters) == ["scale", "scale_step"]
    assert bool(torch.isfinite(q.dequantize()).all())


def test_zero_points_can_be_quantized_as_well() -> None:
    x = gaussian(16, 256) + 1
    exact = QuantSpec.parse("uint4 asym group=32 zero=float").quantize(x)
    q = QuantSpec.parse("uint4 asym group=32 zero=8x64").quantize(x)
    assert exact.zero_point is not None
    want = quantize_scales(exact.zero_point.numpy(), 8, 64)
    assert q.zero_point is not None
    assert (q.zero_point.numpy() == want.codes).all()
    step = exact.scale.repeat_interleave(32, 1)
    zero = torch.tensor(want.values).repeat_interleave(32, 1)
    assert torch.equal(q.dequantize(), (q.codes.float() - zero) * step)
    assert q.bits_per_element == 4 + (32 + 8) / 32 + 64 / (32 * 64)


@pytest.mark.parametrize("text", ["int4 channel via=e4m3fn", "int4 asym group=32 via=e4m3fn", "int4 group=64 via=e5m2"])
def test_via_rounds_to_the_other_element_before_and_after(text: str) -> None:
    spec, x = QuantSpec.parse(text), gaussian(8, 128)
    kind = {"e4m3fn": ml_dtypes.float8_e4m3fn, "e5m2": ml_dtypes.float8_e5m2}[str(spec.via)]
    largest = float(ml_dtypes.finfo(kind).max)
    outer = np.float32(x.abs().max().item()) / np.float32(largest)
    eighths = (x.numpy() / outer).astype(kind).astype(np.float32)
    inner = spec.with_fields({"via": None})
    want = inner.quantize(torch.tensor(eighths))
    q = spec.quantize(x)
    assert q.parameters["via_scale"].item() == outer
    assert torch.equal(q.codes, want.codes)
    assert torch.equal(q.scale, want.scale)
    values = np.clip(want.dequantize().numpy(), -largest, largest).astype(kind).astype(np.float32)
    assert torch.equal(q.dequantize(), torch.tensor(values * outer))
    in_units = (q.dequantize() / outer).numpy()
    # What a kernel multiplies is that element.
    assert np.allclose(in_units, in_units.astype(kind).astype(np.float32), rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "text", ["nvfp4", "nvfp4(mse)", "int4 group=32 scale=e4m3", "int4 channel axis=0,1 via=e4m3fn"]
)
def test_each_of_a_stack_is_quantized_as_if_alone(text: str) -> None:
    x = gaussian(3, 8, 64) * torch.tensor([1.0, 40.0, 1e-3])[:, None, None]
    whole = QuantSpec.parse(f"{text} stack=0").quantize(x)
    one = QuantSpec.parse(text.replace(" axis=0,1", ""))
    for expert in range(3):
        alone = one.quantize(x[expert])
        assert torch.equal(whole.codes[expert], alone.codes)
        assert torch.equal(whole.dequantize()[expert], alone.dequantize())
    assert whole.parameters["via_scale" if "via" in text else "global_scale"].shape == (3, 1, 1)


def test_a_global_scale_can_be_shared() -> None:
    spec, a, b = QuantSpec.parse("nvfp4"), gaussian(8, 64), gaussian(8, 64, seed=1) * 3
    together = spec.quantize(torch.cat([a, b]))
    shared = together.parameters["global_scale"]
    for part, rows in ((a, slice(0, 8)), (b, slice(8, 16))):
        scale, _, outer = choose_qparams(part, spec, (shared,))
        assert torch.equal(scale.view(torch.uint8), together.scale[rows].view(torch.uint8))
        assert torch.equal(quantize(part, scale, None, spec, outer), together.codes[rows])
    with pytest.raises(SpecError, match="global_scale"):
        dequantize(together.codes, together.scale, None, spec)


@pytest.mark.parametrize("text", ["e4m3fn", "e5m2", "e3m2", "e2m1"])
def test_no_scale_casts(text: str) -> None:
    kinds = {"e4m3fn": "float8_e4m3fn", "e5m2": "float8_e5m2", "e3m2": "float6_e3m2fn", "e2m1": "float4_e2m1fn"}
    kind = getattr(ml_dtypes, kinds[text])
    x = gaussian(16, 64) * 2
    q = QuantSpec.parse(f"{text} no_scale").quantize(x)
    largest = float(ml_dtypes.finfo(kind).max)
    assert torch.equal(
        q.dequantize(), torch.tensor(np.clip(x.numpy(), -largest, largest).astype(kind).astype(np.float32))
    )
    assert q.scale.item() == 1


@pytest.mark.parametrize("book", ["nf4", "fp4"])
def test_codebooks_equal_the_oracle(book: str) -> None:
    x = gaussian(64, 128)
    x[3] = 0
    q = QuantSpec.parse(f"{book} group=64").quantize(x)
    scale, codes, values = codebook_oracle(x.numpy().reshape(64, 2, 64), book)
    assert (q.scale.numpy() == scale).all()
    same = q.codes.numpy().reshape(64, 2, 64) == codes
    assert (same | (values == 0)).all()  # fp4 has two codes for 0
    assert (q.dequantize().numpy().reshape(64, 2, 64) == values).all()


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_half_quadratic_zero_points_equal_the_plain_loops(bits: int) -> None:
    x = gaussian(6, 64, seed=bits).to(torch.float64)
    spec = QuantSpec.parse(f"uint{bits} asym group=32 zero=float hqo")
    start = spec.with_fields({"observer": None}).quantize(x)
    q = spec.quantize(x)
    assert start.zero_point is not None
    assert q.zero_point is not None
    for row in range(6):
        for group in range(2):
            first = (start.scale[row, group].item(), start.zero_point[row, group].item())
            part = x[row, group * 32 : group * 32 + 32].numpy()
            want = half_quadratic.hqq_group(part, *first, bits)
            assert q.zero_point[row, group].item() == pytest.approx(want.zero, rel=1e-6, abs=1e-6)


def test_half_quadratic_search_lowers_the_absolute_error() -> None:
    x = gaussian(32, 256)
    for text in ("uint3 asym group=64 zero=float", "int3 group=64", "int4 half group=64", "int3 narrow group=64"):
        plain, better = (QuantSpec.parse(f"{text} {more}").quantize(x).dequantize() for more in ("", "hqo"))
        assert float((x - better).abs().mean()) < float((x - plain).abs().mean())


@pytest.mark.parametrize("text", ["int4 group=32", "int4 asym group=32", "nf4 group=64", "e2m1 group=32"])
@pytest.mark.parametrize("norm", ["", "=2.4"])
def test_golden_section_is_as_good_as_the_grid(text: str, norm: str) -> None:
    x = gaussian(64, 256)
    plain, grid, golden = (
        sqnr_db(x, QuantSpec.parse(f"{text} {search}").quantize(x).dequantize())
        for search in ("", f"mse{norm}", f"golden{norm}")
    )
    assert min(grid, golden) > plain
    assert abs(grid - golden) < 0.2


@pytest.mark.parametrize("element", ["e4m3fn", "e2m1", "nf4", "int8.6 scale=e8m0", "e5m2 scale=e8m0(even)"])
@pytest.mark.parametrize("search", ["", "percentile=99", "mse"])
def test_static_scales_of_every_kind_of_element(element: str, search: str) -> None:
    spec = QuantSpec.parse(f"{element} tensor static {search}")
    batches = [gaussian(4, 40, 8, seed=s) for s in range(3)]
    observer = Observer(spec)
    for batch in batches:
        observer.observe(batch)
    scale, zero, outer = observer.qparams()
    x = torch.cat(batches)
    exact = choose_qparams(x, spec)
    assert (zero, outer) == (None, ())
    assert scale.dtype == exact.scale.dtype

    def db(scale: torch.Tensor) -> float:
        return sqnr_db(x, dequantize(quantize(x, scale, None, spec), scale, None, spec, torch.float32))

    assert db(scale) >= db(exact.scale) - 0.2


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    "text", ["int4 group=16 scale=f16", "nf4 group=16 scale=f16", "e2m1 group=16 scale=bf16", "nvfp4"]
)
def test_half_precision_models_never_meet_a_scale_of_zero_or_nan(text: str, dtype: torch.dtype) -> None:
    x = gaussian(4, 64).to(dtype)
    x[1] *= torch.finfo(dtype).tiny
    x[2] = torch.finfo(dtype).smallest_normal / 8
    q = QuantSpec.parse(text).quantize(x)
    assert bool((q.scale.to(torch.float32) != 0).all())
    assert bool(torch.isfinite(q.dequantize(dtype)).all())


def test_scaling_min_bounds_scales_from_below() -> None:
    x = torch.tensor([[1e-6] * 16 + [3.0] * 16])
    q = QuantSpec.parse("int8 half group=16 scaling_min=1e-4").quantize(x)
    assert q.scale[0, 0].item() == np.float32(1e-4)
    assert q.scale[0, 1].item() == np.float32(3 / 127.5)
    assert not q.codes[0, :16].any()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "text", ["nvfp4", "nf4 group=8", "e4m3fn", "e2m1 group=8", "int4 double=8x8", "mx9", "int4 via=e4m3fn"]
)
def test_nan_and_infinity_are_refused_where_there_is_no_home_for_them(text: str, bad: float) -> None:
    x = gaussian(4, 16)
    x[2, 5] = bad
    with pytest.raises(SpecError, match="nan or infinity; find its source"):
        QuantSpec.parse(text).quantize(x)


def test_nan_is_kept_where_the_format_has_one() -> None:
    x = gaussian(4, 32)
    x[2, 5] = math.nan
    block = QuantSpec.parse("mxfp4").quantize(x)
    assert block.scale.view(torch.uint8)[2].item() == 255
    assert torch.isnan(block.dequantize()).any(1).tolist() == [False, False, True, False]
    cast = QuantSpec.parse("e4m3fn no_scale").quantize(x).dequantize()
    assert torch.isnan(cast).nonzero().tolist() == [[2, 5]]
    with pytest.raises(SpecError, match="nan"):
        QuantSpec.parse("e2m1 no_scale").quantize(x)


@pytest.mark.parametrize(
    "text", ["mxfp4", "nvfp4", "mx6", "bfp16", "nf4 group=16", "int4 group=16 double=8x256", "e4m3fn"]
)
@pytest.mark.parametrize("shape", [(0, 32), (2, 0), (0,)])
def test_empty_tensors(text: str, shape: tuple[int, ...]) -> None:
    q = QuantSpec.parse(text).quantize(torch.empty(shape))
    assert q.codes.shape == q.dequantize().shape == shape
    assert [tuple(t.shape) for t in q.parameters.values()] == [p.shape for p in q.spec.parameters(shape)]


@pytest.mark.parametrize("text", ["mxfp4", "nvfp4", "e4m3fn channel", "mx9"])
def test_a_tensor_without_axes_is_refused(text: str) -> None:
    with pytest.raises(SpecError, match="use tensor"):
        QuantSpec.parse(text).quantize(torch.tensor(3.0))
