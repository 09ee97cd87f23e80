"""GPTQ, AWQ and compressed-tensors: bits lie where the formats say, and where the packages read them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.backends.hf.awq import Awq
from qcompile.backends.hf.compressed import PackQuantized
from qcompile.backends.hf.gptq import BITS, Gptq
from qcompile.backends.hf.pack import Grouped, pack_fp4, unpack_fp4
from qcompile.errors import SpecError
from qcompile.numerics.packing import code_range

ASYMMETRIC = [(True, False), (False, False)]
KINDS = [(True, True), *ASYMMETRIC]


def weight(
    bits: int, signed: bool, symmetric: bool, lowest_zero: int = 1, shape: tuple[int, int] = (32, 64)
) -> Grouped:
    """Every code, random zero-points that are at least `lowest_zero` above the lowest."""
    low, high = code_range(bits, signed)
    generator = torch.Generator().manual_seed(bits)
    dtype = torch.int8 if signed else torch.uint8
    every = torch.arange(shape[0] * shape[1]) % (high - low + 1) + low
    codes = every[torch.randperm(len(every), generator=generator)].view(shape).to(dtype)
    groups = (shape[0], shape[1] // 16)
    zero = torch.randint(low + lowest_zero, high + 1, groups, generator=generator).to(dtype)
    return Grouped(codes, torch.randn(groups, generator=generator).half(), None if symmetric else zero)


def same(before: Grouped, after: Grouped) -> bool:
    def equal(a: Tensor | None, b: Tensor | None) -> bool:
        return (a is None) == (b is None) and (a is None or b is None or (a.dtype == b.dtype and torch.equal(a, b)))

    names = ("codes", "scale", "zero_point", "group_index")
    return all(equal(getattr(before, name), getattr(after, name)) for name in names)


def from_zero(tensor: Tensor, bits: int) -> list[list[int]]:
    return (tensor.int() - code_range(bits, tensor.dtype == torch.int8)[0]).tolist()  # type: ignore[no-any-return]


def stream(column: list[int], bits: int) -> list[int]:
    """int32 words of one big integer that has code i at bit i * bits."""
    data = sum(code << (place * bits) for place, code in enumerate(column)).to_bytes(len(column) * bits // 8, "little")
    return [int.from_bytes(data[at : at + 4], "little", signed=True) for at in range(0, len(data), 4)]


def three_bit_words(column: list[int]) -> list[int]:
    """Three words of 32 codes as GPTQ's first 3-bit kernels were written: 10 codes and 2 bits, 1 + 10 + 1, 2 + 10."""
    first = sum(column[j] << 3 * j for j in range(10)) | (column[10] & 3) << 30
    second = column[10] >> 2 | sum(column[11 + j] << 3 * j + 1 for j in range(10)) | (column[21] & 1) << 31
    third = column[21] >> 1 | sum(column[22 + j] << 3 * j + 2 for j in range(10))
    return [word - (word >> 31 << 32) for word in (first, second, third)]


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("signed", "symmetric"), KINDS)
def test_gptq_comes_back(bits: int, signed: bool, symmetric: bool, version: int) -> None:
    layout = Gptq(bits, signed, symmetric, version)
    before = weight(bits, signed, symmetric, lowest_zero=2 - version)
    assert same(before, layout.unpack(layout.pack(before)))


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("signed", "symmetric"), KINDS)
def test_gptq_words(bits: int, signed: bool, symmetric: bool, version: int) -> None:
    before = weight(bits, signed, symmetric)
    tensors = Gptq(bits, signed, symmetric, version).pack(before)
    assert [*map(tuple, (t.shape for t in tensors.values()))] == [(2 * bits, 32), (4, bits), (4, 32), (64,)]
    codes = from_zero(before.codes, bits)
    assert tensors["qweight"].t().tolist() == [stream(row, bits) for row in codes]
    zero = torch.zeros_like(before.codes[:, :4]) if before.zero_point is None else before.zero_point
    stored = [[z - (2 - version) for z in row] for row in from_zero(zero.t(), bits)]
    assert tensors["qzeros"].tolist() == [stream(row, bits) for row in stored]
    assert torch.equal(tensors["scales"], before.scale.t())
    assert tensors["g_idx"].tolist() == [k // 16 for k in range(64)]


def test_gptq_three_bits_cross_words() -> None:
    before = weight(3, False, False)
    words = Gptq(3, False, False).pack(before)["qweight"].t()
    halves = [row for codes in from_zero(before.codes, 3) for row in (codes[:32], codes[32:])]
    assert words.reshape(-1, 3).tolist() == [three_bit_words(half) for half in halves]


def test_gptq_keeps_the_order_of_groups() -> None:
    before = weight(4, True, True)
    index = torch.arange(64, dtype=torch.int32) % 4
    layout = Gptq(4, True, True)
    tensors = layout.pack(Grouped(before.codes, before.scale, None, index))
    assert torch.equal(tensors["g_idx"], index)
    assert same(Grouped(before.codes, before.scale, None, index), layout.unpack(tensors))


def test_gptq_refuses_what_readers_take_in_two_ways() -> None:
    before = weight(4, True, False)
    assert before.zero_point is not None
    before.zero_point[3, 1] = -8
    with pytest.raises(SpecError, match="a zero-point of -8, the lowest code, cannot be stored in GPTQ version 1"):
        Gptq(4, True, False).pack(before)
    tensors = Gptq(4, True, False, version=2).pack(before)
    tensors["qzeros"] = torch.full_like(tensors["qzeros"], -1)
    with pytest.raises(SpecError, match="qzeros: the value 15 lies outside 0 to 14"):
        Gptq(4, True, False).unpack(tensors)


def test_gptq_refuses_what_does_not_fit() -> None:
    with pytest.raises(SpecError, match="2, 3, 4 or 8 bits, not 5"):
        Gptq(5, True, True)
    with pytest.raises(SpecError, match="not 3"):
        Gptq(4, True, True, version=3)
    with pytest.raises(SpecError, match=r"\[8, 16\] does not fill int32 words of 3 bits"):
        Gptq(3, True, True).pack(weight(3, True, True, shape=(8, 16)))
    with pytest.raises(SpecError, match="symmetric is True and one is given"):
        Gptq(4, True, True).pack(weight(4, True, False))
    tensors = Gptq(4, True, False).pack(weight(4, True, False))
    with pytest.raises(SpecError, match="qzeros of a symmetric weight"):
        Gptq(4, True, True).unpack(tensors)


@pytest.mark.parametrize(("signed", "symmetric"), KINDS)
def test_awq(signed: bool, symmetric: bool) -> None:
    layout, before = Awq(signed, symmetric), weight(4, signed, symmetric, lowest_zero=0)
    tensors = layout.pack(before)
    assert same(before, layout.unpack(tensors))
    zero = torch.zeros_like(before.codes[:, :4]) if before.zero_point is None else before.zero_point
    for name, columns in (("qweight", from_zero(before.codes.t(), 4)), ("qzeros", from_zero(zero.t(), 4))):
        expected = [
            [stream([row[at + place] for place in (0, 2, 4, 6, 1, 3, 5, 7)], 4)[0] for at in range(0, 32, 8)]
            for row in columns
        ]
        assert tensors[name].tolist() == expected
    assert torch.equal(tensors["scales"], before.scale.t())


def test_awq_refuses_what_does_not_fit() -> None:
    with pytest.raises(SpecError, match="12 is no multiple of 8"):
        Awq(True, True).pack(weight(4, True, True, shape=(12, 16)))
    before = weight(4, True, True)
    shuffled = Grouped(before.codes, before.scale, None, torch.arange(64, dtype=torch.int32) % 4)
    with pytest.raises(SpecError, match="no group_index"):
        Awq(True, True).pack(shuffled)
    with pytest.raises(SpecError, match="qzeros of a symmetric weight"):
        Awq(True, True).unpack(Awq(True, False).pack(weight(4, True, False)))


@pytest.mark.parametrize("shape", [(32, 64), (10, 48)])
@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize(("signed", "symmetric"), KINDS)
def test_pack_quantized_comes_back(bits: int, signed: bool, symmetric: bool, shape: tuple[int, int]) -> None:
    layout, before = PackQuantized(bits, signed, symmetric), weight(bits, signed, symmetric, 0, shape)
    tensors = layout.pack(before)
    assert tensors["weight_packed"].shape == (shape[0], -(-shape[1] * bits // 32))
    assert same(before, layout.unpack(tensors))
    if shape == (32, 64):
        assert tensors["weight_packed"].tolist() == [stream(row, bits) for row in from_zero(before.codes, bits)]


@pytest.mark.parametrize("shape", [(32, 64), (10, 48)])
@pytest.mark.parametrize("bits", range(1, 9))
def test_pack_quantized_is_what_compressed_tensors_reads(bits: int, shape: tuple[int, int]) -> None:
    helpers: Any = pytest.importorskip("compressed_tensors.compressors.pack_quantized.helpers")
    before = weight(bits, True, False, 0, shape)
    tensors = PackQuantized(bits, True, False).pack(before)
    assert torch.equal(tensors["weight_packed"], helpers.pack_to_int32(before.codes, bits))
    assert torch.equal(helpers.unpack_from_int32(tensors["weight_packed"], bits, shape), before.codes)
    zero = helpers.pack_to_int32(before.zero_point, bits, packed_dim=0)
    assert torch.equal(tensors["weight_zero_point"], zero)


def test_pack_quantized_refuses_what_does_not_fit() -> None:
    with pytest.raises(SpecError, match="readers take code 8 for 0"):
        PackQuantized(4, False, True).pack(weight(4, False, True))
    tensors = PackQuantized(4, True, True).pack(weight(4, True, True))
    with pytest.raises(SpecError, match="rows of 7 int32 are not 64 codes"):
        PackQuantized(4, True, True).unpack(tensors | {"weight_packed": tensors["weight_packed"][:, 1:]})


E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def every_pair() -> Tensor:
    return torch.cartesian_prod(torch.arange(16), torch.arange(16)).to(torch.uint8).view(16, 32)


def test_fp4_pairs() -> None:
    codes = every_pair()
    packed = pack_fp4(codes)
    assert packed.flatten().tolist() == [low + 16 * high for low in range(16) for high in range(16)]
    assert torch.equal(unpack_fp4(packed), codes)
    with pytest.raises(SpecError, match="even number of inputs"):
        pack_fp4(codes[:, :3])
    with pytest.raises(SpecError, match="the value 16 lies outside 0 to 15"):
        pack_fp4(torch.full((2, 2), 16, dtype=torch.uint8))


def test_fp4_is_what_compressed_tensors_reads() -> None:
    helpers: Any = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers")
    values = torch.tensor(E2M1)[every_pair().long()]
    packed = pack_fp4(every_pair())
    assert torch.equal(helpers.unpack_fp4_from_uint8(packed, 16, 32, torch.float32), values)
    assert torch.equal(helpers.pack_fp4_to_uint8(values), packed)


def test_fp4_is_what_transformers_reads() -> None:
    mxfp4: Any = pytest.importorskip("transformers.integrations.mxfp4")
    blocks = pack_fp4(every_pair()).view(1, 16, 1, 16)  # experts, outputs, groups, bytes
    scales = torch.full((1, 16, 1), 127 + 3, dtype=torch.uint8)
    values = mxfp4.convert_moe_packed_tensors(blocks, scales, dtype=torch.float32)
    assert torch.equal(values[0].t(), 8 * torch.tensor(E2M1)[every_pair().long()])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scale": torch.ones(31, 4)}, r"codes \[32, 64\] and scale \[31, 4\]"),
        ({"scale": torch.ones(32, 5)}, "5 groups do not divide 64 inputs"),
        ({"zero_point": torch.zeros(32, 4)}, "use zero=int"),
        ({"group_index": torch.zeros(64)}, r"not int32 \[64\]"),
        ({"group_index": torch.full((64,), 4, dtype=torch.int32)}, "names groups 4 to 4; there are 4"),
    ],
)
def test_parts_that_do_not_fit_one_another(changes: dict[str, Tensor], message: str) -> None:
    parts = {"codes": torch.zeros(32, 64, dtype=torch.int8), "scale": torch.ones(32, 4)}
    with pytest.raises(SpecError, match=message):
        Grouped(**(parts | changes))
