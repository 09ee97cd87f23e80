"""Codes, scales, zero-points and values, bit for bit against plain loops, over everything a spec can say."""

from __future__ import annotations

import ml_dtypes  # noqa: F401  (gives numpy its bfloat16)
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles import integer_quantization as oracle

from qcompile.numerics import QuantSpec, choose_qparams, dequantize, quantize
from qcompile.numerics.blocks import tiles

DTYPES = {"float32": torch.float32, "float64": torch.float64, "float16": torch.float16, "bfloat16": torch.bfloat16}
# Words of a granularity, a shape it suits, and the block of entries that share a scale.
LAYOUTS = [
    ("tensor", (4, 6), (4, 6)),
    ("tensor", (), ()),
    ("channel", (4, 6), (1, 6)),
    ("channel axis=1", (4, 6), (4, 1)),
    ("channel axis=-1", (2, 3, 4), (2, 3, 1)),
    ("channel axis=0,1", (2, 3, 4), (1, 1, 4)),
    ("channel", (5,), (1,)),
    ("token", (2, 3, 4), (1, 1, 4)),
    ("group=2", (3, 8), (1, 2)),
    ("group=4 axis=0", (8, 3), (4, 1)),
    ("group=8", (3, 8), (1, 8)),
    ("group=1", (3, 4), (1, 1)),
    ("group=3 axis=1", (2, 6, 2), (1, 3, 1)),
    ("block=2x4", (4, 8), (2, 4)),
    ("block=2x2", (2, 4, 2), (1, 2, 2)),
]
SCALES = ["f32", "f16", "bf16", "pow2", "pow2(floor)", "pow2(round)", "pow2(midmax)"]


@st.composite
def words(draw: st.DrawFn) -> oracle.Words:
    if draw(st.integers(0, 15)) == 0:
        return oracle.Words(2, ternary=True, range="narrow", scale=draw(st.sampled_from(SCALES)))
    bits, signed, symmetric = draw(st.integers(1, 8)), draw(st.booleans()), draw(st.booleans())
    scale = draw(st.sampled_from(SCALES))
    ranges = ["signed", "full"] if bits == 1 else ["signed", "half", "full", "narrow"]
    if scale.startswith("pow2"):
        ranges.remove("signed")
    return oracle.Words(
        bits,
        signed,
        symmetric=symmetric,
        range=draw(st.sampled_from(ranges)) if signed and symmetric else "full",
        scale=scale,
        zero="none" if symmetric else draw(st.sampled_from(["int", "float"])),
    )


def text_of(word: oracle.Words, granularity: str) -> str:
    if word.ternary:
        return f"ternary {granularity} scale={word.scale}"
    element = f"{'' if word.signed else 'u'}int{word.bits}"
    symmetry = f"sym {word.range}" if word.symmetric else f"asym zero={word.zero}"
    return f"{element} {symmetry} {granularity} scale={word.scale}"


@st.composite
def values(draw: st.DrawFn, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Entries of one magnitude or of all, many of them ties, zeros and equal pairs of both signs."""
    limit = oracle.LARGEST[dtype]
    kind = draw(st.sampled_from(["integers", "halves", "normal", "any", "tiny", "huge", "positive", "negative"]))
    entry = {
        "integers": st.integers(-8, 8).map(float),
        "halves": st.integers(-31, 31).map(lambda n: n / 2),
        "normal": st.floats(-4, 4),
        "any": st.floats(-limit, limit),
        "tiny": st.floats(-1e-38, 1e-38),
        "huge": st.sampled_from([limit, -limit, limit / 2, limit / 3, -limit / 8, 0.0]),
        "positive": st.floats(0, 100),
        "negative": st.floats(-100, 0),
    }[kind]
    count = int(np.prod(shape))
    flat = torch.tensor(draw(st.lists(entry, min_size=count, max_size=count)), dtype=torch.float64)
    flat = flat.clamp(-limit, limit).to(DTYPES[dtype])
    return flat.to(torch.float64).numpy().reshape(shape)


@settings(max_examples=600, deadline=None)
@given(st.data(), words(), st.sampled_from(LAYOUTS), st.sampled_from(list(DTYPES)))
def test_every_spec_agrees_with_plain_loops(
    data: st.DataObject, word: oracle.Words, layout: tuple[str, tuple[int, ...], tuple[int, ...]], dtype: str
) -> None:
    granularity, shape, block = layout
    spec = QuantSpec.parse(text_of(word, granularity))
    array = data.draw(values(shape, dtype))
    x = torch.tensor(array).to(DTYPES[dtype]).reshape(shape)

    scale, zero, _ = choose_qparams(x, spec)
    codes = quantize(x, scale, zero, spec)
    work = torch.float64 if dtype == "float64" else torch.float32
    restored = dequantize(codes, scale, zero, spec, work)

    want_codes, want_scale, want_zero, want_values = oracle.quantize(array, block, word, dtype)
    assert scale.dtype == spec.scale_dtype
    assert scale.shape == want_scale.shape
    assert scale.to(torch.float64).tolist() == want_scale.astype(np.float64).tolist()
    if zero is None:
        assert word.symmetric
    else:
        assert zero.dtype == spec.zero_dtype
        assert zero.to(torch.float64).tolist() == want_zero.astype(np.float64).tolist()
    assert codes.tolist() == want_codes.tolist()
    assert torch.equal(restored, torch.tensor(want_values).reshape(shape))
    assert bool(torch.isfinite(restored).all())
    assert bool(torch.isfinite(dequantize(codes, scale, zero, spec, x.dtype)).all())


@settings(max_examples=150, deadline=None)
@given(words(), st.integers(0, 1 << 30))
def test_error_is_at_most_half_a_step_within_the_range_of_codes(word: oracle.Words, seed: int) -> None:
    spec = QuantSpec.parse(text_of(word, "group=16"))
    x = torch.randn(8, 64, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    q = spec.quantize(x)
    restored = q.dequantize(torch.float64)
    offset = torch.zeros(()) if q.zero_point is None else q.zero_point.to(torch.float64).repeat_interleave(16, 1)
    scale = q.scale.to(torch.float64).repeat_interleave(16, 1)
    ends = torch.stack([(spec.qmin - offset) * scale, (spec.qmax - offset) * scale])
    inside = x.clamp(ends.amin(0), ends.amax(0))
    assert bool(((restored - inside).abs() <= scale.abs() / 2 * (1 + 1e-12)).all())


@pytest.mark.parametrize("text", ["int4 group=128", "int4 asym group=32 zero=float", "int8", "int8 asym tensor"])
@pytest.mark.parametrize("shape", [(300, 1024), (3, 130, 1024), (1, 1, 262144)])
def test_tiles_change_nothing(text: str, shape: tuple[int, ...]) -> None:
    spec = QuantSpec.parse(text)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    scale, zero, _ = choose_qparams(x, spec)
    block = [n // s for n, s in zip(shape, scale.shape, strict=True)]
    wide_scale, wide_zero = (torch.zeros(1) if t is None else t.to(torch.float32) for t in (scale, zero))
    for axis, size in enumerate(block):
        wide_scale = wide_scale.repeat_interleave(size, axis)
        wide_zero = wide_zero if zero is None else wide_zero.repeat_interleave(size, axis)
    steps = x / wide_scale
    steps = (steps + wide_zero).round() if spec.zero == "float" else steps.round() + wide_zero
    want = steps.clamp(spec.qmin, spec.qmax)
    codes = quantize(x, scale, zero, spec)
    assert torch.equal(codes.to(torch.float32), want)
    assert torch.equal(dequantize(codes, scale, zero, spec), (want - wide_zero) * wide_scale)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 6), st.integers(1, 6)), min_size=0, max_size=3),
    st.booleans(),
    st.integers(1, 40),
)
def test_tiles_cover_everything_once(sizes: list[tuple[int, int]], whole_blocks: bool, elements: int) -> None:
    shape, scale_shape = tuple(a * b for a, b in sizes), tuple(a for a, _ in sizes)
    seen, scales_of = torch.zeros(shape), torch.full(shape, -1.0)
    scale = torch.arange(scale_shape_size(scale_shape), dtype=torch.float32).reshape(scale_shape)
    want = scale
    for axis, (_, block) in enumerate(sizes):
        want = want.repeat_interleave(block, axis)
    for here, there in tiles(shape, scale_shape, whole_blocks=whole_blocks, elements=elements):
        seen[here] += 1
        part = scale[there]
        for axis in range(len(shape)):
            part = part.repeat_interleave(seen[here].shape[axis] // part.shape[axis], axis)
        scales_of[here] = part
        if whole_blocks:
            ratio = seen[here].numel() // scale[there].numel()
            assert ratio == int(np.prod([b for _, b in sizes]))
    assert bool((seen == 1).all())
    assert torch.equal(scales_of, want)


def scale_shape_size(shape: tuple[int, ...]) -> int:
    return int(np.prod(shape))


def test_strided_input_gives_the_same_codes() -> None:
    x = torch.randn(64, 48, generator=torch.Generator().manual_seed(0))
    for text in ("int4 group=16", "int4 asym group=8 axis=0", "int4 block=8x8 percentile=90"):
        spec = QuantSpec.parse(text)
        straight, strided = spec.quantize(x.t().contiguous()), spec.quantize(x.t())
        assert torch.equal(straight.codes, strided.codes)
        assert torch.equal(straight.scale, strided.scale)
        assert strided.codes.is_contiguous()
