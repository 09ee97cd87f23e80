"""Formats print and parse, and give back the codes they packed."""

from __future__ import annotations

import pytest
import torch

from qcompile.backends.triton.formats import WeightFormat, format_of
from qcompile.backends.triton.ops.weight_only import dequantize
from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec


@pytest.mark.parametrize(
    "text",
    [
        "int4 group=32",
        "int3 asym group=16",
        "uint7 asym group=32 zero=float",
        "mxfp4",
        "nvfp4",
        "nf4 group=64",
        "e4m3fn block=32x32",
        "int8 tensor",
        "mxint8",
        "e3m2 channel",
        "int4 group=64 scale=pow2",
        "ternary channel",
    ],
)
def test_a_weight_comes_back(text: str) -> None:
    spec = QuantSpec.parse(text)
    quantized = spec.quantize(torch.randn(96, 192, generator=torch.Generator().manual_seed(0)) + 0.2)
    form = format_of(spec, (96, 192), tuple(quantized.scale.shape))
    assert isinstance(form, WeightFormat)
    assert WeightFormat.parse(str(form)) == form
    planes = form.pack(quantized.codes)
    assert [(tuple(p.shape), p.dtype) for p in planes] == form.plane_shapes(96)
    assert torch.equal(form.unpack(list(planes)), quantized.codes)
    zero = None if quantized.zero_point is None else quantized.zero_point.t()
    outer = quantized.outer[0].reshape(1) if form.outer else None
    values = dequantize(planes, quantized.scale.t(), zero, outer, str(form), torch.float32)
    assert torch.equal(values, quantized.dequantize(torch.float32))


def test_three_bits_in_short_runs_take_four() -> None:
    spec = QuantSpec.parse("int3 group=16")
    form = format_of(spec, (32, 64), (32, 4))
    assert isinstance(form, WeightFormat)
    assert (form.bits, form.block_k) == (4, 16)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int4 group=8", "smaller than a tensor core's step"),
        ("int4 group=32 double=8x64", "quantized themselves"),
        ("int4 group=32 via=e4m3fn", "rounded to e4m3fn"),
        ("e4m3fn no_scale", "cast"),
        ("mx9", "micro"),
    ],
)
def test_why_a_spec_has_no_format(text: str, reason: str) -> None:
    spec = QuantSpec.parse(text)
    found = format_of(spec, (64, 64), tuple(spec.scale_shape((64, 64))))
    assert isinstance(found, str)
    assert reason in found


def test_a_step_never_reads_one_scale_for_several_groups() -> None:
    with pytest.raises(SpecError, match=r"block_k=64 does not divide groups of 32.*divides 32"):
        WeightFormat("int4", 4, 128, 64, 32)


@pytest.mark.parametrize("text", ["int4 bits=4", "int4 bits=4 k=64 block_k=64 groop=0"])
def test_a_format_that_is_none(text: str) -> None:
    with pytest.raises(SpecError, match="exactly the fields"):
        WeightFormat.parse(text)
