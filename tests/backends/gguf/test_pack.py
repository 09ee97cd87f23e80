"""GGUF blocks: what is packed decodes to code * scale - offset in plain Python and in gguf, and comes back."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from oracles.gguf_blocks import decode, e2m1, e4m3
from torch import Tensor

from qcompile.backends.gguf.pack import TYPES, Blocks, Integers, home
from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec


def integers(kind: Integers, shape: tuple[int, ...], seed: int) -> Tensor:
    """Every value the kind has, shuffled over `shape`."""
    generator = torch.Generator().manual_seed(seed)
    count = torch.Size(shape).numel()
    values = torch.arange(count) % (kind.highest - kind.lowest + 1) + kind.lowest
    stored = values[torch.randperm(count, generator=generator)].to(torch.int8 if kind.lowest < 0 else torch.uint8)
    return stored.view(kind.dtype).reshape(shape)


def random_blocks(name: str, rows: tuple[int, ...] = (3,), columns: int = 512) -> Blocks:
    kind = TYPES[name]
    generator = torch.Generator().manual_seed(1)

    def scale(seed: int) -> Tensor:
        shape = (*rows, columns // kind.group)
        if kind.scale is not None:
            return integers(kind.scale, shape, seed)
        return torch.randn(shape, generator=generator).to(torch.float16)

    def outer(given: bool) -> Tensor | None:
        return torch.randn((*rows, columns // 256), generator=generator).to(torch.float16) if given else None

    codes = integers(kind.codes, (*rows, columns), 2)
    offset = scale(4) if kind.offset else None
    return Blocks(codes, scale(3), offset, outer(kind.outer), outer(kind.outer and kind.offset))


def values(name: str, blocks: Blocks) -> Tensor:
    """float64 `[..., n]`: code * scale * outer_scale - offset * outer_offset."""
    group = TYPES[name].group

    def spread(tensor: Tensor, to: int) -> Tensor:
        return tensor.to(torch.float64).repeat_interleave(to, -1)

    if name == "MXFP4":
        scale = torch.tensor([2.0 ** (int(s) - 127) for s in blocks.scale.view(torch.uint8).flatten()])
    elif name == "NVFP4":
        scale = torch.tensor([e4m3(int(s)) for s in blocks.scale.view(torch.uint8).flatten()])
    else:
        scale = blocks.scale
    scale = spread(scale.reshape(blocks.scale.shape), group)
    codes = blocks.codes.to(torch.float64)
    if "FP4" in name:
        codes = torch.tensor([e2m1(int(c)) for c in blocks.codes.flatten()]).reshape(codes.shape).to(torch.float64)
    found = codes * scale * (1 if blocks.outer_scale is None else spread(blocks.outer_scale, 256))
    if blocks.offset is not None:
        offset = spread(blocks.offset, group)
        found = found - offset * (1 if blocks.outer_offset is None else spread(blocks.outer_offset, 256))
    return found


@pytest.mark.parametrize("name", TYPES)
def test_what_is_packed_comes_back(name: str) -> None:
    blocks = random_blocks(name, (2, 3))
    kind = TYPES[name]
    data = kind.pack(blocks)
    assert data.shape == (2, 3, 512 // kind.block * kind.size)
    found = kind.unpack(data)
    for field in fields(Blocks):
        before, after = getattr(blocks, field.name), getattr(found, field.name)
        assert (before is None) == (after is None), field.name
        if before is not None:
            assert before.dtype == after.dtype, field.name
            assert torch.equal(before.view(torch.uint8), after.view(torch.uint8)), field.name


@pytest.mark.parametrize("name", TYPES)
def test_blocks_decode_to_the_values_in_plain_python(name: str) -> None:
    blocks, kind = random_blocks(name, (2,)), TYPES[name]
    data = kind.pack(blocks).reshape(-1, kind.size)
    decoded = torch.tensor([decode(name, bytes(block.tolist())) for block in data], dtype=torch.float64)
    assert torch.equal(decoded.reshape(2, -1), values(name, blocks))


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize("name", TYPES)
def test_blocks_decode_to_the_values_in_gguf(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    blocks = random_blocks(name)
    decoded = gguf.quants.dequantize(TYPES[name].pack(blocks).numpy(), gguf.GGMLQuantizationType[name])
    assert torch.equal(torch.from_numpy(decoded), values(name, blocks).to(torch.float32))


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "TQ1_0", "TQ2_0", "MXFP4"])
def test_what_gguf_writes_comes_back_byte_for_byte(name: str) -> None:
    gguf = pytest.importorskip("gguf")
    x = torch.randn(4, 512, generator=torch.Generator().manual_seed(0))
    data = torch.from_numpy(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name]))
    assert torch.equal(TYPES[name].pack(TYPES[name].unpack(data)), data)


@pytest.mark.parametrize(
    ("name", "spec", "differ"),
    [
        ("Q4_0", "int4 sym group=32 scale=f16", 0.001),
        ("Q5_0", "int5 sym group=32 scale=f16", 0.002),
        ("Q8_0", "int8 sym narrow group=32 scale=f16", 0.015),
        ("TQ2_0", "ternary group=256 scale=f16", 0.001),
    ],
)
def test_gguf_finds_our_scales_and_nearly_our_codes(name: str, spec: str, differ: float) -> None:
    gguf = pytest.importorskip("gguf")
    x = torch.randn(256, 512, generator=torch.Generator().manual_seed(0)) * 0.02
    theirs = TYPES[name].unpack(torch.from_numpy(gguf.quants.quantize(x.numpy(), gguf.GGMLQuantizationType[name])))
    ours = QuantSpec.parse(spec).quantize(x)
    assert torch.equal(theirs.scale, ours.scale)
    assert (theirs.codes != ours.codes).float().mean() < differ
    assert (theirs.codes.int() - ours.codes.int()).abs().max() <= 1


@pytest.mark.parametrize(
    "spec",
    [
        "int3 sym group=32 scale=f16",
        "int4 sym group=128 scale=f16",
        "int4 sym half group=64 scale=f16",
        "int5 sym group=32 scale=f16",
        "int8 sym group=32 scale=f16",
        "uint4 sym group=32 scale=f16",
        "uint5 sym group=32 scale=f16",
        "ternary group=256 scale=f16",
        "ternary group=32 scale=f16",
    ],
)
def test_a_home_holds_exactly_what_the_spec_gives(spec: str) -> None:
    parsed = QuantSpec.parse(spec)
    q = parsed.quantize(torch.randn(8, 512, generator=torch.Generator().manual_seed(0)))
    name = home(parsed)
    assert name is not None
    blocks = TYPES[name].unpack(TYPES[name].pack(Blocks.of(q.codes, q.scale, q.zero_point)))
    assert torch.equal(values(name, blocks).to(torch.float32), q.dequantize(torch.float32))


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("int4 sym group=32 scale=f16", "Q4_0"),
        ("int2 sym group=32 scale=f16", "Q4_0"),
        ("int6 sym group=32 scale=f16", "Q8_0"),
        ("ternary group=256 scale=f16", "TQ1_0"),
        ("int4 sym group=32", None),  # a float32 scale is no float16
        ("int4 sym group=16 scale=f16", None),
        ("int4 sym channel scale=f16", None),
        ("int4 asym group=32 scale=f16", None),  # zero_point * scale is no float16
        ("int4 sym group=32 axis=0 scale=f16", None),
        ("uint6 sym group=32 scale=f16", None),
        ("mxfp4", "MXFP4"),
        ("mxfp4(even)", "MXFP4"),
        ("mxfp4(noclip)", None),  # steps are 4/3 of a power of two
        ("e2m1 group=64 scale=e8m0", None),
        ("nvfp4", "NVFP4"),
        ("e2m1 group=16", None),
        ("int6 sym group=16 double=8x16(sym)", None),  # the outer step is a float32
    ],
)
def test_homes(spec: str, name: str | None) -> None:
    assert home(QuantSpec.parse(spec)) == name


@pytest.mark.parametrize("spec", ["mxfp4(even)", "mxfp4(ceil)", "nvfp4", "e2m1 group=16 scale=e4m3(bare)"])
def test_a_four_bit_float_keeps_its_values(spec: str) -> None:
    parsed = QuantSpec.parse(spec)
    q = parsed.quantize(torch.randn(8, 512, generator=torch.Generator().manual_seed(0)))
    name = home(parsed)
    assert name is not None
    found = values(name, TYPES[name].unpack(TYPES[name].pack(Blocks(q.codes, q.scale))))
    outer = float(q.outer[0]) if q.outer else 1.0  # NVFP4's global scale is a tensor of its own in the file
    torch.testing.assert_close((found / outer).to(torch.float32), q.dequantize(torch.float32), rtol=2e-7, atol=0)


def test_an_offset_is_taken_where_it_is_a_float16() -> None:
    codes = integers(TYPES["Q4_1"].codes, (2, 64), 0)
    scale = torch.tensor([[0.5, 0.25], [1.0, 2.0]])
    zero = torch.tensor([[3, 8], [15, 0]], dtype=torch.uint8)
    blocks = Blocks.of(codes, scale, zero)
    found = TYPES["Q4_1"].unpack(TYPES["Q4_1"].pack(blocks))
    expected = (codes.double().view(2, 2, 32) - zero[..., None]) * scale[..., None]
    assert torch.equal(values("Q4_1", found).view(2, 2, 32), expected)
    tenth = torch.full((2, 2), 0.1, dtype=torch.float16)
    with pytest.raises(SpecError, match=r"the offset 0\.2999\d* is no float16"):
        TYPES["Q4_1"].pack(Blocks.of(codes, tenth, torch.full((2, 2), 3, dtype=torch.uint8)))


def test_what_does_not_fit_is_refused() -> None:
    blocks = random_blocks("Q4_0")
    with pytest.raises(SpecError, match="Q4_0 codes: the value 8 lies outside -8 to 7"):
        TYPES["Q4_0"].pack(replace(blocks, codes=torch.full((3, 512), 8, dtype=torch.int8)))
    with pytest.raises(SpecError, match=r"Q4_0 codes are torch\.uint8"):
        TYPES["Q4_0"].pack(replace(blocks, codes=torch.zeros(3, 512, dtype=torch.uint8)))
    with pytest.raises(SpecError, match="rows of 48 values are not whole blocks"):
        TYPES["Q4_0"].pack(replace(blocks, codes=blocks.codes[:, :48]))
    with pytest.raises(SpecError, match="a scale every 32 values, and 32 for 512"):
        TYPES["Q4_0"].pack(replace(blocks, scale=blocks.scale.repeat(1, 2)))
    with pytest.raises(SpecError, match="has no offset"):
        TYPES["Q4_0"].pack(replace(blocks, offset=blocks.scale))
    with pytest.raises(SpecError, match="no float16"):
        TYPES["Q4_0"].pack(replace(blocks, scale=torch.full((3, 16), 1e6)))
    with pytest.raises(SpecError, match="Q6_K takes outer_scale, one a block of 256; given are none"):
        TYPES["Q6_K"].pack(replace(random_blocks("Q6_K"), outer_scale=None))
    nan = torch.full((3, 16), 255, dtype=torch.uint8).view(torch.float8_e8m0fnu)
    with pytest.raises(SpecError, match="MXFP4 scale: the value 255"):
        TYPES["MXFP4"].pack(replace(random_blocks("MXFP4"), scale=nan))


def test_a_changed_block_is_refused() -> None:
    data = TYPES["TQ2_0"].pack(random_blocks("TQ2_0"))
    data[0, 0] |= 3
    with pytest.raises(SpecError, match="TQ2_0 codes: the value 2 lies outside -1 to 1"):
        TYPES["TQ2_0"].unpack(data)
    data = TYPES["TQ1_0"].pack(random_blocks("TQ1_0"))
    data[0, 50] += 1  # of four digits: no such byte is written
    with pytest.raises(SpecError, match="none that five digits give"):
        TYPES["TQ1_0"].unpack(data)
    with pytest.raises(SpecError, match="not whole blocks of TQ1_0, 54 bytes each"):
        TYPES["TQ1_0"].unpack(data[:, :-1])
