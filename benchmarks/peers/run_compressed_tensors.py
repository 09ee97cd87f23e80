"""compressed-tensors: MX and NVFP4 as it stores them, and integers by group."""

from __future__ import annotations

from collections.abc import Callable

import torch
from compressed_tensors.compressors.mx_utils import compress_mx_scale
from compressed_tensors.compressors.nvfp4.helpers import pack_fp4_to_uint8, unpack_fp4_from_uint8
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from compressed_tensors.quantization.utils import calculate_qparams, generate_gparam
from exchange import Format, main

Kept = tuple[torch.Tensor, ...]


def extremes(x: torch.Tensor, group: int) -> Kept:
    blocks = x.unflatten(-1, (-1, group))
    return blocks.amin(-1), blocks.amax(-1)


def grouped(
    args: QuantizationArgs, pack: Callable[[torch.Tensor], torch.Tensor], decode: Callable[[Kept], torch.Tensor]
) -> Format:
    def encode(x: torch.Tensor) -> Kept:
        scale, zero = calculate_qparams(*extremes(x, args.group_size), args)
        return pack(quantize(x, scale, zero, args)), scale

    is_mx = args.scale_dtype == torch.uint8
    return Format(
        args.group_size, encode, decode, (lambda kept: compress_mx_scale(kept[1], torch.uint8)) if is_mx else None
    )


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    return unpack_fp4_from_uint8(packed, packed.shape[0], 2 * packed.shape[1], dtype=torch.float32)


def mx_args(bits: int) -> QuantizationArgs:
    return QuantizationArgs(
        num_bits=bits, type="float", strategy="group", group_size=32, symmetric=True, scale_dtype=torch.uint8
    )


def int_args(bits: int) -> QuantizationArgs:
    return QuantizationArgs(num_bits=bits, type="int", strategy="group", group_size=128, symmetric=True)


NVFP4 = QuantizationArgs(
    num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True, scale_dtype=torch.float8_e4m3fn
)


def nvfp4_encode(x: torch.Tensor) -> Kept:
    outer = generate_gparam(x.amin(), x.amax())
    scale, zero = calculate_qparams(*extremes(x, 16), NVFP4, global_scale=outer)
    return pack_fp4_to_uint8(quantize(x, scale, zero, NVFP4, global_scale=outer)), scale.to(torch.float8_e4m3fn), outer


def nvfp4_decode(kept: Kept) -> torch.Tensor:
    packed, scale, outer = kept
    return dequantize(fp4_values(packed), scale.to(torch.float32), None, NVFP4, global_scale=outer)


def ints(bits: int) -> Format:
    args = int_args(bits)

    def decode(kept: Kept) -> torch.Tensor:
        return dequantize(kept[0], kept[1], None, args)

    return grouped(args, lambda codes: codes.to(torch.int8), decode)


FORMATS = {
    "mxfp4(even)": grouped(
        mx_args(4), pack_fp4_to_uint8, lambda kept: dequantize(fp4_values(kept[0]), kept[1], None, mx_args(4))
    ),
    "mxfp6_e2m3(even)": grouped(mx_args(6), lambda values: values, lambda kept: dequantize(*kept, None, mx_args(6))),
    "mxfp8_e4m3(even)": grouped(
        mx_args(8),
        lambda values: values.to(torch.float8_e4m3fn),
        lambda kept: dequantize(kept[0].to(torch.float32), kept[1], None, mx_args(8)),
    ),
    "nvfp4": Format(16, nvfp4_encode, nvfp4_decode, lambda kept: kept[1].view(torch.uint8), lambda kept: kept[2]),
    "int4 sym group=128": ints(4),
    "int8 sym group=128": ints(8),
}

if __name__ == "__main__":
    main("compressed-tensors", FORMATS)
