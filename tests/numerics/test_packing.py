"""The dense bit stream: what numpy and a loop over bits make of it, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics import packing
from qcompile.numerics.packing import (
    check_codes,
    code_range,
    from_unsigned,
    pack,
    pack_words,
    packed_bytes,
    to_unsigned,
    unpack,
    unpack_words,
)


def random_codes(bits: int, signed: bool, shape: tuple[int, ...], seed: int = 0) -> Tensor:
    low, high = code_range(bits, signed)
    values = torch.randint(low, high + 1, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.int8 if signed else torch.uint8)


def stream_in_a_loop(codes: Tensor, bits: int) -> list[int]:
    """Bytes from the description: one big integer, code i at bit i * bits."""
    whole = sum((code % (1 << bits)) << (place * bits) for place, code in enumerate(codes.flatten().tolist()))
    return list(whole.to_bytes(-(-codes.numel() * bits // 8), "little"))


@given(st.integers(1, 8), st.booleans(), st.lists(st.integers(0, 7), max_size=3), st.integers(0, 99))
def test_round_trip_of_any_shape(bits: int, signed: bool, shape: list[int], seed: int) -> None:
    codes = random_codes(bits, signed, tuple(shape), seed)
    packed = pack(codes, bits)
    assert packed.dtype == torch.uint8
    assert packed.tolist() == stream_in_a_loop(codes, bits)
    found = unpack(packed, bits, shape, signed)
    assert found.dtype == codes.dtype
    assert torch.equal(found, codes)


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", range(1, 9))
def test_every_code_at_every_place(bits: int, signed: bool) -> None:
    low, high = code_range(bits, signed)
    every = torch.arange(low, high + 1)
    codes = torch.cat([every.roll(shift) for shift in range(8)]).to(torch.int8 if signed else torch.uint8)
    packed = pack(codes, bits)
    little = np.unpackbits(codes.view(torch.uint8).numpy()[:, None], axis=1, bitorder="little")[:, :bits]
    assert np.array_equal(packed.numpy(), np.packbits(little.reshape(-1), bitorder="little"))
    assert torch.equal(unpack(packed, bits, codes.shape, signed), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_tiles_join_without_a_seam(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(bits, True, (7, 53))
    whole = pack(codes, bits)
    monkeypatch.setattr(packing, "_TILE", 16)
    assert torch.equal(pack(codes, bits), whole)
    assert torch.equal(unpack(whole, bits, codes.shape, True), codes)


@pytest.mark.parametrize("bits", range(1, 9))
def test_views_that_start_anywhere(bits: int) -> None:
    codes = random_codes(bits, False, (6, 24))
    for odd in (codes.flatten()[3:], codes.flatten()[3:131]):  # the second fills whole words, but from no word's start
        assert pack(odd, bits).tolist() == stream_in_a_loop(odd, bits)
        assert torch.equal(unpack_words(pack_words(odd, bits), bits, len(odd), signed=False), odd)
    assert pack(codes.t(), bits).tolist() == stream_in_a_loop(codes.t(), bits)
    within = torch.cat([torch.zeros(5, dtype=torch.uint8), pack(codes, bits)])[5:]
    assert torch.equal(unpack(within, bits, codes.shape, False), codes)


def test_three_bits_take_three_eighths_of_the_bytes() -> None:
    assert pack(torch.tensor([1, 2, 3, 4, 5, 6, 7, 0], dtype=torch.uint8), 3).tolist() == [0xD1, 0x58, 0x1F]
    assert pack(torch.zeros(64, 64, dtype=torch.int8), 3).shape == (64 * 64 * 3 // 8,)
    assert packed_bytes(11, 3) == 5


@pytest.mark.parametrize(
    ("codes", "bits", "message"),
    [
        (torch.tensor([0, 8], dtype=torch.int8), 4, "the value 8 lies outside -8 to 7"),
        (torch.tensor([0, -9], dtype=torch.int8), 4, "the value -9 lies outside -8 to 7"),
        (torch.tensor([0, 8], dtype=torch.uint8), 3, "the value 8 lies outside 0 to 7"),
        (torch.tensor([0, 1], dtype=torch.int8), 1, "the value 1 lies outside -1 to 0"),
        (torch.tensor([0, 1]), 4, r"int8 or uint8, not torch\.int64"),
        (torch.tensor([0, 1], dtype=torch.uint8), 9, "1 to 8 bits, not 9"),
        (torch.tensor([0, 1], dtype=torch.uint8), 0, "1 to 8 bits, not 0"),
    ],
)
def test_what_cannot_be_packed_is_named(codes: Tensor, bits: int, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        pack(codes, bits)


@pytest.mark.parametrize(
    ("packed", "bits", "shape", "message"),
    [
        ([0, 0, 0], 4, (2, 2), "3 bytes are not 4 codes of 4 bits"),
        ([0], 4, (2, 2), "1 bytes are not 4 codes of 4 bits"),
        ([0, 0b10000], 4, (3,), "followed by bits that are not 0"),
        ([0x80], 1, (7,), "followed by bits that are not 0"),
        ([0] * 3, 9, (2,), "1 to 8 bits, not 9"),
    ],
)
def test_data_that_does_not_fit_is_refused(packed: list[int], bits: int, shape: tuple[int, ...], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        unpack(torch.tensor(packed, dtype=torch.uint8), bits, shape, signed=False)


def test_other_dtypes_are_no_packed_codes() -> None:
    with pytest.raises(SpecError, match=r"uint8, not torch\.int8"):
        unpack(torch.zeros(2, dtype=torch.int8), 4, (4,), signed=True)
    with pytest.raises(SpecError, match=r"int32, not torch\.int64"):
        unpack_words(torch.zeros(2, dtype=torch.int64), 4, 16, signed=True)


def test_codes_outside_the_element_are_found() -> None:
    narrow = torch.tensor([[-127, 127], [-128, 0]], dtype=torch.int8)
    with pytest.raises(SpecError, match=r"^a\.weight: the value -128 lies outside -127 to 127; "):
        check_codes(narrow, -127, 127, "a.weight")
    ternary = unpack(torch.tensor([0b10], dtype=torch.uint8), 2, (1,), signed=True)  # no code of {-1, 0, 1} is 10
    with pytest.raises(SpecError, match="the value -2 lies outside -1 to 1"):
        check_codes(ternary, -1, 1, "w")
    check_codes(narrow[:1], -127, 127, "w")
    check_codes(narrow[:0], 0, 0, "nothing")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("count", [1, 10, 32, 33, 64])
def test_rows_of_words(bits: int, count: int) -> None:
    codes = random_codes(bits, True, (2, 3, count))
    words = pack_words(codes, bits)
    assert words.dtype == torch.int32
    assert words.shape == (2, 3, -(-count * bits // 32))
    filled = [stream_in_a_loop(row, bits) for row in codes.view(6, count)]
    expected = [row + [0] * (-len(row) % 4) for row in filled]
    assert words.view(6, -1).view(torch.uint8).tolist() == expected
    assert torch.equal(unpack_words(words, bits, count, signed=True), codes)


def test_words_that_were_changed_are_refused() -> None:
    words = pack_words(random_codes(3, False, (2, 10)), 3)
    with pytest.raises(SpecError, match="rows of 1 int32 are not 11 codes of 3 bits, which take 2"):
        unpack_words(words, 3, 11, signed=False)
    words[1, 0] |= 1 << 30
    with pytest.raises(SpecError, match="followed by bits that are not 0"):
        unpack_words(words, 3, 10, signed=False)


@pytest.mark.parametrize("bits", range(1, 9))
def test_codes_counted_from_zero(bits: int) -> None:
    low, high = code_range(bits, True)
    codes = torch.arange(low, high + 1).to(torch.int8)
    assert to_unsigned(codes, bits).tolist() == list(range(1 << bits))
    assert torch.equal(from_unsigned(to_unsigned(codes, bits), bits, True), codes)
    unsigned = random_codes(bits, False, (9,))
    assert torch.equal(from_unsigned(to_unsigned(unsigned, bits), bits, False), unsigned)
