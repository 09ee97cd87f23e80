"""Every combination that a spec string can name: refused with a reason, or stable, nearest, and of the size it claims."""

from __future__ import annotations

import math

import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import QTensor, QuantSpec, dequantize
from qcompile.numerics.element import ELEMENTS
from qcompile.numerics.formats import NAMES
from qcompile.numerics.packing import pack, unpack
from qcompile.numerics.scale_type import Pow2Scale

WORDS = {
    "symmetry": ["", "sym", "asym"],
    "range": ["", "", "signed", "half", "full", "narrow"],
    "granularity": [
        *("", "tensor", "channel", "channel axis=1", "token", "group=2", "group=16", "group=32", "group=8 axis=0"),
        *("block=4x16", "channel axis=0,1"),
    ],
    "scale": [
        *("", "", "scale=f16", "scale=bf16", "scale=pow2", "scale=pow2(floor)", "scale=pow2(round)"),
        *("scale=pow2(midmax)", "scale=e8m0", "scale=e8m0(even)", "scale=e8m0(ceil)", "scale=e8m0(rceil)"),
        *("scale=e8m0(noclip)", "scale=e8m0(bfp)", "scale=e4m3", "scale=e4m3(bare)", "scale=micro(16)"),
        *("double=8x256", "double=6x32", "double=8x64(sym)"),
    ],
    "zero": ["", "", "zero=none", "zero=int", "zero=float", "zero=8x32", "zero=4x16"],
    "when": ["", "", "", "static", "dynamic", "no_scale"],
    "observer": ["", "", "absmax", "minmax", "percentile=99", "mse", "mse=2.4", "golden", "hqo"],
    "more": ["", "", "", "via=e4m3fn", "via=e5m2", "stack=0", "scaling_min=1e-3"],
}
FIRST = [
    *ELEMENTS,
    "e3m4",
    "e5m1",
    "e2m5",
    "e3m2fnuz",
    "e4m3(plain)",
    "e1m2",
    "int8.6",
    *(n for n in NAMES if n != "bfp"),
]
FIRST += ["mxfp4(even)", "mxfp4(mse)", "mxfp4(noclip)", "mxint8(rceil)", "nvfp4(mse)", "bfp(block=16 bits=5)"]


@st.composite
def specs(draw: st.DrawFn) -> str:
    """A spec string of any words: most of those that say much are refused."""
    words = [draw(st.sampled_from(FIRST))]
    for name, choices in WORDS.items():
        # Few words at a time, so that possible specs are common.
        if name in ("symmetry", "granularity", "scale") or draw(st.integers(0, 2)) == 0:
            words.append(draw(st.sampled_from(choices)))
    return " ".join(" ".join(words).split())


def data(seed: int, shape: tuple[int, ...]) -> Tensor:
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=random) * torch.rand(shape[:-1], generator=random).unsqueeze(-1).exp2()
    x[..., 1, :16] = 0  # groups of zeros
    return x


def measured_bits(q: QTensor) -> float:
    """Bits of everything that is stored, packed, over the elements."""
    bits = 8 * pack(q.codes, q.spec.bits).numel()
    for entry, tensor in zip(q.spec.parameters(q.codes.shape), q.parameters.values(), strict=True):
        assert (tuple(tensor.shape), tensor.dtype) == (entry.shape, entry.dtype), entry.name
        if isinstance(q.spec.scale, Pow2Scale) and entry.name == "scale":
            assert torch.equal(tensor, torch.exp2(torch.log2(tensor).round()))  # the eight bits of its exponent
            bits += 8 * tensor.numel()
        elif entry.bits < 8:
            bits += 8 * pack(tensor, entry.bits).numel()
        else:
            assert entry.bits == 8 * tensor.element_size()
            bits += 8 * tensor.nbytes
    return bits / q.codes.numel()


def nearest_error(x: Tensor, q: QTensor) -> Tensor:
    """The distance of every entry from the nearest value that some code in its place would have."""
    least = torch.full(x.shape, math.inf)
    for code in range(q.spec.qmin, q.spec.qmax + 1):
        every = torch.full_like(q.codes, code)
        value = dequantize(every, q.scale, q.zero_point, q.spec, torch.float32, q.outer)
        distance = (x - value).abs()
        least = torch.where(torch.isfinite(value), torch.minimum(least, distance), least)
    return least


@settings(max_examples=500, deadline=None)
@given(specs(), st.integers(0, 1000))
def test_a_spec_is_refused_with_a_reason_or_works(text: str, seed: int) -> None:
    try:
        spec = QuantSpec.parse(text)
        spec.scale_shape((8, 64))
    except SpecError as error:
        message = str(error)
        assert "\n" not in message
        assert len(message) > 20
        assert any(word in message for word in ("use", "drop", "keep", "write", "add", "set", "needs"))
        return
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec.from_fields(spec.fields()) == spec
    x = data(seed, (3, 8, 64) if spec.stack is not None else (8, 64))
    try:
        q = spec.quantize(x)
    except SpecError as error:
        reason = str(error)
    else:
        reason = ""
    if reason:
        assert "axis" in reason or "divide" in reason
        return
    packed = pack(q.codes, spec.bits)
    codes = unpack(packed, spec.bits, q.codes.shape, spec.signed)
    assert torch.equal(codes, q.codes)
    again = QTensor(codes, q.scale, q.zero_point, spec, q.outer).dequantize(torch.float32)
    restored = q.dequantize(torch.float32)
    assert torch.equal(again.view(torch.int32), restored.view(torch.int32))
    assert bool(torch.isfinite(restored).all())
    padding = 8 * (1 + sum(p.bits < 8 for p in spec.parameters(x.shape))) / x.numel()
    assert spec.bits_per_element(x.shape) - 1e-9 <= measured_bits(q) <= spec.bits_per_element(x.shape) + padding

    assume(spec.via is None)  # values are rounded once more on the way
    bound = nearest_error(x, q)
    assert bool(((x - restored).abs() <= bound * (1 + 1e-5) + 1e-6 * x.abs().max()).all())
