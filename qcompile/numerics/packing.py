"""Codes as a dense stream of bits: b bits each, nothing between them. Every layout of a backend is a permutation of it.

Code i, in row-major order, takes the bits [i*b, (i+1)*b) of the stream; bit n of the stream is bit n % 8 of byte
n // 8 (ONNX lies so, onnx.proto, TensorProto.raw_data; numpy calls it little). Signed codes are two's complement. The
last byte is filled up with zeros. Eight codes take b bytes:

    b = 3   byte 0: c2[1:0] c1 c0    byte 1: c5[0] c4 c3 c2[2]    byte 2: c7 c6 c5[2:1]        (high bit first)
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd, prod

import torch
from torch import Tensor

from qcompile.errors import SpecError

_TILE = 1 << 21
"""Codes handled at once on a CPU: what is made on the way stays in the cache, five times as fast as all at once."""

_WORDS = {16: torch.int16, 32: torch.int32, 64: torch.int64}


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` take."""
    return -(-count * bits // 8)


def pack(codes: Tensor, bits: int) -> Tensor:
    """`codes`, int8 (signed) or uint8 of any shape, as uint8 `[packed_bytes(n, bits)]`; 1 to 8 bits.

    At 8 bits the result may share the memory of `codes`.

    Raises SpecError for a code that `bits` cannot hold, another dtype, or another number of bits.
    """
    check_codes(codes, *code_range(bits, _is_signed(codes)), "the tensor to pack")
    flat = codes.contiguous().view(torch.uint8).reshape(-1)
    count = len(flat)
    if flat.storage_offset() % 8:  # words cannot be viewed there
        flat = flat.clone()
    if bits == 8:
        return flat
    if count % 8:
        flat = torch.nn.functional.pad(flat, (0, -count % 8))
    packed = flat.new_empty(len(flat) // 8 * bits)
    for here, there in _tiles(len(flat), bits, flat.device):
        packed[there] = _squeeze(flat[here].view(torch.int64), bits)
    return packed[: packed_bytes(count, bits)]


def unpack(packed: Tensor, bits: int, shape: Sequence[int], signed: bool) -> Tensor:
    """The codes of `shape` that `pack` turned into `packed`: int8 where `signed`, else uint8.

    At 8 bits the result may share the memory of `packed`.

    Raises SpecError where `packed` is not uint8, has not the bytes that `shape` takes, or ends in bits that are not 0.
    """
    code_range(bits, signed)
    count = prod(shape)
    _check_packed(packed, bits, shape)
    flat = packed.contiguous().reshape(-1)
    if bits < 8:
        if count % 8 or 8 % bits:
            flat = torch.nn.functional.pad(flat, (0, 8))  # a whole last unit, and eight bytes from the start of each
        room = flat.new_empty(count + -count % 8)
        for here, there in _tiles(len(room), bits, flat.device):
            _spread(flat[there], room[here].view(torch.int64), bits)
        flat = room[:count]
    codes = flat.view(torch.int8) if signed else flat
    if signed and bits < 8:
        half = 1 << (bits - 1)
        codes.bitwise_xor_(half).sub_(half)
    return codes.reshape(tuple(shape))


def pack_words(codes: Tensor, bits: int) -> Tensor:
    """`codes` `[..., n]` as int32 `[..., ceil(n * bits / 32)]`: a dense stream per row, rows filled up with zeros.

    Raises SpecError as `pack` does.
    """
    *rows, count = codes.shape
    padded = torch.nn.functional.pad(codes, (0, -count % _unit(bits)))
    words = pack(padded, bits).view(torch.int32).view(*rows, padded.shape[-1] * bits // 32)
    return words[..., : -(-count * bits // 32)].contiguous()


def unpack_words(words: Tensor, bits: int, count: int, signed: bool) -> Tensor:
    """The codes `[..., count]` that `pack_words` turned into `words`; SpecError as `unpack` raises it."""
    if words.dtype != torch.int32:
        raise SpecError(f"packed words are int32, not {words.dtype}; pass what pack_words returned")
    *rows, found = words.shape
    if found != -(-count * bits // 32):
        raise SpecError(
            f"rows of {found} int32 are not {count} codes of {bits} bits, which take {-(-count * bits // 32)}; the "
            "data was cut, or belongs to another tensor"
        )
    total = count + -count % _unit(bits)
    padded = torch.nn.functional.pad(words, (0, total * bits // 32 - found)).contiguous()
    codes = unpack(padded.view(torch.uint8), bits, (*rows, total), signed)
    if bool(codes[..., count:].any()):
        raise SpecError(
            f"rows of {count} codes of {bits} bits are followed by bits that are not 0; the data was changed"
        )
    return codes[..., :count].contiguous()


def to_unsigned(codes: Tensor, bits: int) -> Tensor:
    """`codes` as uint8 from 0: signed ones have 2^(bits - 1) added, so that -2^(bits - 1) is 0; unsigned ones stay."""
    return codes.view(torch.uint8) + (1 << (bits - 1)) if _is_signed(codes) else codes


def from_unsigned(codes: Tensor, bits: int, signed: bool) -> Tensor:
    """The inverse of `to_unsigned`."""
    return (codes - (1 << (bits - 1))).view(torch.int8) if signed else codes


def check_codes(codes: Tensor, lowest: int, highest: int, name: str) -> None:
    """Raise SpecError that names the tensor and the value where a code lies outside `lowest` to `highest`.

    What is read from a file is checked with it: a two-bit field can hold a 3 where a ternary code was written, a byte
    a -128 where the element is narrow.
    """
    if codes.numel() == 0:
        return
    low, high = (int(end) for end in codes.aminmax())
    if low < lowest or high > highest:
        wrong = low if low < lowest else high
        raise SpecError(
            f"{name}: the value {wrong} lies outside {lowest} to {highest}; write it again from the codes that were "
            "computed, or use an element that holds it"
        )


def code_range(bits: int, signed: bool) -> tuple[int, int]:
    """Lowest and highest code of `bits` bits, 1 to 8; SpecError for another number."""
    if not 1 <= bits <= 8:
        raise SpecError(f"codes have 1 to 8 bits, not {bits}; use int1 to int8 or uint1 to uint8")
    return (-(1 << (bits - 1)), (1 << (bits - 1)) - 1) if signed else (0, (1 << bits) - 1)


def _unit(bits: int) -> int:
    """The fewest codes that fill whole int32 words."""
    return 32 // gcd(32, bits)


def _is_signed(codes: Tensor) -> bool:
    if codes.dtype not in (torch.int8, torch.uint8):
        raise SpecError(f"codes are int8 or uint8, not {codes.dtype}; pass the codes tensor, one code an element")
    return codes.dtype == torch.int8


def _check_packed(packed: Tensor, bits: int, shape: Sequence[int]) -> None:
    count = prod(shape)
    if packed.dtype != torch.uint8:
        raise SpecError(f"packed codes are uint8, not {packed.dtype}; pass what pack returned")
    if packed.numel() != packed_bytes(count, bits):
        raise SpecError(
            f"{packed.numel()} bytes are not {count} codes of {bits} bits (shape {list(shape)}), which take "
            f"{packed_bytes(count, bits)}; the data was cut, or belongs to another tensor"
        )
    if (used := count * bits % 8) and int(packed.reshape(-1)[-1]) >> used:
        raise SpecError(
            f"{count} codes of {bits} bits (shape {list(shape)}) are followed by bits that are not 0; the data was "
            "changed, or belongs to another tensor"
        )


def _tiles(count: int, bits: int, device: torch.device) -> Iterator[tuple[slice, slice]]:
    """Slices of `count` codes, whole units of eight, and of their stream."""
    step = _TILE if device.type == "cpu" else max(count, 8)
    for start in range(0, count, step):
        stop = min(start + step, count)
        yield slice(start, stop), slice(start // 8 * bits, stop // 8 * bits)


def _squeeze(codes: Tensor, bits: int) -> Tensor:
    """The stream of `codes`, eight to an int64 `[n]`, as uint8 `[n * bits]`.

    Where codes fill a byte, one product moves all of them there: c0 + 256 c1, times 16 + 1, has c0 + 16 c1 in its bits
    4 to 11. Otherwise neighbouring lanes are joined to lanes of twice the width, three times.
    """
    words = codes & _mask(8, bits)
    if 8 % bits == 0:
        per_byte = 8 // bits
        top = (8 - bits) * (per_byte - 1)
        lanes = words.view(_WORDS[8 * per_byte])
        lanes *= sum(1 << (top - (8 - bits) * place) for place in range(per_byte))
        lanes >>= top
        return lanes.to(torch.uint8)
    for lane, used in ((8, bits), (16, 2 * bits), (32, 4 * bits)):
        upper = words >> (lane - used)
        words &= _mask(2 * lane, used)
        upper &= _mask(2 * lane, used, used)
        words |= upper
    return words.view(torch.uint8).view(-1, 8)[:, :bits].reshape(-1)


def _spread(stream: Tensor, codes: Tensor, bits: int) -> None:
    """The inverse of `_squeeze` into `codes`, eight to an int64 `[n]`, unsigned; lanes are halved until each is a byte.

    Where 8 is no multiple of `bits`, `stream` is read up to eight bytes from the start of the last unit.
    """
    if 8 % bits == 0:
        lane, used = 64 // bits, 8
        codes.view(_WORDS[lane]).copy_(stream)
    else:
        lane, used = 64, 8 * bits
        codes.view(torch.uint8).view(-1, 8).copy_(stream.as_strided((codes.numel(), 8), (bits, 1)))
        codes &= _mask(lane, used)  # the rest belongs to the next unit
    while lane > 8:
        lane, used = lane // 2, used // 2
        upper = codes << (lane - used)
        if 2 * used > lane:  # the two would meet: both are cut before they are joined, not after
            codes &= _mask(2 * lane, used)
            upper &= _mask(2 * lane, used, lane)
        codes |= upper
        if 2 * used <= lane:
            codes &= _mask(lane, used)


def _mask(lane: int, used: int, start: int = 0) -> int:
    """An int64 with `used` bits set from bit `start` of each lane of `lane` bits; its highest bit never is."""
    return sum(((1 << used) - 1) << place + start for place in range(0, 64, lane))
