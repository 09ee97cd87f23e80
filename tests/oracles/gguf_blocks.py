"""GGUF blocks decoded in plain Python, one value at a time, from the structures of ggml-common.h."""

from __future__ import annotations

import struct

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def half(data: bytes, at: int) -> float:
    return float(struct.unpack_from("<e", data, at)[0])


def e2m1(code: int) -> float:
    return -E2M1[code & 7] if code & 8 else E2M1[code]


def e4m3(code: int) -> float:
    exponent, mantissa = code >> 3, code & 7
    return mantissa * 2.0**-9 if exponent == 0 else (1 + mantissa / 8) * 2.0 ** (exponent - 7)


def nibble(data: bytes, at: int, j: int) -> int:
    """Value j of 32 in 16 bytes: the low halves hold 0 to 15, the high ones 16 to 31."""
    return data[at + j % 16] >> (4 * (j // 16)) & 15


def six_bits(data: bytes, at: int, j: int) -> tuple[int, int]:
    """Scale and minimum j of eight, in twelve bytes (get_scale_min_k4)."""
    if j < 4:
        return data[at + j] & 63, data[at + 4 + j] & 63
    low = data[at + 4 + j]
    return low & 15 | data[at + j - 4] >> 6 << 4, low >> 4 | data[at + j] >> 6 << 4


def decode(name: str, data: bytes) -> list[float]:
    """The values of one block."""
    match name:
        case "Q4_0":
            return [half(data, 0) * (nibble(data, 2, j) - 8) for j in range(32)]
        case "Q4_1":
            return [half(data, 0) * nibble(data, 4, j) + half(data, 2) for j in range(32)]
        case "Q5_0" | "Q5_1":
            return _fives(name, data)
        case "Q8_0":
            return [half(data, 0) * q for q in struct.unpack_from("<32b", data, 2)]
        case "MXFP4":
            return [e2m1(nibble(data, 1, j)) * 2.0 ** (data[0] - 127) for j in range(32)]
        case "NVFP4":
            return [
                e4m3(data[j // 16]) * e2m1(data[4 + j // 16 * 8 + j % 8] >> (4 * (j // 8 % 2)) & 15) for j in range(64)
            ]
        case "TQ1_0":
            return [half(data, 52) * (_trit(data, j) - 1) for j in range(256)]
        case "TQ2_0":
            return [
                half(data, 64) * ((data[j // 128 * 32 + j % 32] >> (2 * (j // 32 % 4)) & 3) - 1) for j in range(256)
            ]
        case "Q6_K":
            return [_six(data, j) for j in range(256)]
        case "Q3_K":
            return [_three(data, j) for j in range(256)]
        case "Q2_K":
            return [_two(data, j) for j in range(256)]
    return [_four_or_five(name, data, j) for j in range(256)]


def _fives(name: str, data: bytes) -> list[float]:
    at = 2 if name == "Q5_0" else 4
    high = int.from_bytes(data[at : at + 4], "little")
    codes = [nibble(data, at + 4, j) | (high >> j & 1) << 4 for j in range(32)]
    if name == "Q5_0":
        return [half(data, 0) * (code - 16) for code in codes]
    return [half(data, 0) * code + half(data, 2) for code in codes]


def _trit(data: bytes, j: int) -> int:
    if j < 160:
        byte, digit = j % 32, j // 32
    elif j < 240:
        byte, digit = 32 + (j - 160) % 16, (j - 160) // 16
    else:
        byte, digit = 48 + (j - 240) % 4, (j - 240) // 4
    return (data[byte] * 3**digit % 256) * 3 // 256


def _two(data: bytes, j: int) -> float:
    pair = data[j // 16]
    code = data[16 + j // 128 * 32 + j % 32] >> (2 * (j // 32 % 4)) & 3
    return half(data, 80) * (pair & 15) * code - half(data, 82) * (pair >> 4)


def _three(data: bytes, j: int) -> float:
    group = j // 16
    low = data[96 + group % 8] >> (4 * (group // 8)) & 15
    high = data[104 + group % 4] >> (2 * (group // 4)) & 3
    code = data[32 + j // 128 * 32 + j % 32] >> (2 * (j // 32 % 4)) & 3
    above = data[j % 32] >> (j // 32) & 1
    return half(data, 108) * ((low | high << 4) - 32) * (code - (0 if above else 4))


def _four_or_five(name: str, data: bytes, j: int) -> float:
    scale, minimum = six_bits(data, 4, j // 32)
    at = 16 if name == "Q4_K" else 48
    code = data[at + j // 64 * 32 + j % 32] >> (4 * (j // 32 % 2)) & 15
    if name == "Q5_K":
        code |= (data[16 + j % 32] >> (j // 32) & 1) << 4
    return half(data, 0) * scale * code - half(data, 2) * minimum


def _six(data: bytes, j: int) -> float:
    low = data[j // 128 * 64 + j % 64] >> (4 * (j // 64 % 2)) & 15
    high = data[128 + j // 128 * 32 + j % 32] >> (2 * (j // 32 % 4)) & 3
    (scale,) = struct.unpack_from("<b", data, 192 + j // 16)
    return half(data, 208) * scale * ((low | high << 4) - 32)
