"""torchao: MX and NVFP4 of its prototype, affine integers, NF4, and its float casts."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from exchange import Format, main
from torchao.prototype.mx_formats.config import ScaleCalculationMode
from torchao.prototype.mx_formats.kernels import (
    f4_unpacked_to_f32,
    f6_e2m3_unpacked_to_f32,
    f6_e3m2_unpacked_to_f32,
    f32_to_f4_unpacked,
    f32_to_f6_e2m3_unpacked,
    f32_to_f6_e3m2_unpacked,
    unpack_uint4,
)
from torchao.prototype.mx_formats.mx_tensor import to_dtype, to_mx
from torchao.prototype.mx_formats.nvfp4_tensor import nvfp4_quantize, per_tensor_amax_to_scale
from torchao.quantization.quant_primitives import (
    MappingType,
    choose_qparams_affine,
    dequantize_affine,
    quantize_affine,
)
from torchao.quantization.quantize_.workflows.nf4.nf4_tensor import to_nf4

MX = {
    "mxfp8_e4m3": torch.float8_e4m3fn,
    "mxfp8_e5m2": torch.float8_e5m2,
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": torch.float4_e2m1fn_x2,
}


def mx(element: Any, rule: str) -> Format:
    mode = ScaleCalculationMode(rule)

    def decode(kept: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        return to_dtype(kept[1], kept[0], element, 32, torch.float32)

    return Format(
        32,
        partial(to_mx, elem_dtype=element, block_size=32, scaling_mode=mode),
        decode,
        lambda k: k[0].view(torch.uint8),
    )


def nvfp4_encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
    outer = per_tensor_amax_to_scale(x.abs().amax())
    return (*nvfp4_quantize(x, 16, outer), outer)


def nvfp4_decode(kept: tuple[torch.Tensor, ...]) -> torch.Tensor:
    scale, packed, outer = kept  # as NVFP4Tensor.dequantize does
    step = scale.to(torch.float32) * outer
    codes = f4_unpacked_to_f32(unpack_uint4(packed))
    return (codes.view(*codes.shape[:-1], -1, 16) * step.unsqueeze(-1)).view(codes.shape)


def affine(bits: int, group: int, symmetric: bool) -> Format:
    kind = MappingType.SYMMETRIC if symmetric else MappingType.ASYMMETRIC
    low, high = (-(2 ** (bits - 1)), 2 ** (bits - 1) - 1) if symmetric else (0, 2**bits - 1)
    dtype = torch.int8 if symmetric else torch.uint8

    def encode(x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        scale, zero = choose_qparams_affine(x, kind, (1, group), dtype, low, high)
        return quantize_affine(x, (1, group), scale, zero, dtype, low, high), scale, zero

    def decode(kept: tuple[torch.Tensor, ...]) -> torch.Tensor:
        return dequantize_affine(kept[0], (1, group), kept[1], kept[2], dtype, low, high)

    return Format(group, encode, decode)


def float8(dtype: torch.dtype) -> Format:
    return Format(1, lambda x: x.to(dtype), lambda codes: codes.to(torch.float32))


FORMATS = {f"{name}({rule})": mx(e, rule) for name, e in MX.items() for rule in ("floor", "even", "ceil", "rceil")}
FORMATS |= {
    "nvfp4": Format(16, nvfp4_encode, nvfp4_decode, lambda kept: kept[0].view(torch.uint8)),
    "int4 sym group=128": affine(4, 128, True),
    "int4 asym group=128": affine(4, 128, False),
    "int8 sym group=128": affine(8, 128, True),
    "nf4 group=64": Format(64, lambda x: to_nf4(x, 64, 256), lambda kept: kept.get_original_weight()),
    "e4m3fn no_scale": float8(torch.float8_e4m3fn),
    "e5m2 no_scale": float8(torch.float8_e5m2),
    "e2m1 no_scale": Format(1, f32_to_f4_unpacked, f4_unpacked_to_f32),
    "e3m2 no_scale": Format(1, f32_to_f6_e3m2_unpacked, f6_e3m2_unpacked_to_f32),
    "e2m3 no_scale": Format(1, f32_to_f6_e2m3_unpacked, f6_e2m3_unpacked_to_f32),
}

if __name__ == "__main__":
    main("torchao", FORMATS)
