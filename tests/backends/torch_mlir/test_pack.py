"""Bytes for MLIR's narrow integers and for the custom operator: against loops, torch-mlir's own golden, and IREE."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from qcompile.backends.torch_mlir.pack import (
    container_bits,
    pack_groups,
    pack_matmul_rhs,
    unpack_groups,
    unpack_matmul_rhs,
)
from qcompile.errors import SpecError
from qcompile.numerics.packing import code_range

ALL = [(bits, signed) for bits in range(1, 9) for signed in (True, False)]


def every_code(bits: int, signed: bool, shape: tuple[int, ...]) -> Tensor:
    low, high = code_range(bits, signed)
    count = torch.Size(shape).numel()
    generator = torch.Generator().manual_seed(count)
    codes = (torch.arange(count) % (high - low + 1) + low)[torch.randperm(count, generator=generator)]
    return codes.view(shape).to(torch.int8 if signed else torch.uint8)


@pytest.mark.parametrize(("bits", "signed"), ALL)
def test_groups(bits: int, signed: bool) -> None:
    codes, width = every_code(bits, signed, (4, 96)), container_bits(bits)
    packed = pack_groups(codes, 32, bits)
    assert packed.dtype == torch.int8
    assert packed.shape == (4, 3, 32 * width // 8)
    assert torch.equal(unpack_groups(packed, bits, signed), codes)
    per_byte = 8 // width
    for byte, at in zip(packed.flatten().tolist(), range(0, codes.numel(), per_byte), strict=True):
        here = codes.flatten()[at : at + per_byte].tolist()
        assert byte % 256 == sum((code % (1 << width)) << (width * place) for place, code in enumerate(here))


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("bits", [2, 4])
def test_iree_bitcasts_groups_to_the_codes(bits: int, signed: bool) -> None:
    compiler: Any = pytest.importorskip("iree.compiler")
    runtime: Any = pytest.importorskip("iree.runtime")
    codes = every_code(bits, signed, (2, 48))
    packed, kinds = pack_groups(codes, 16, bits), f"tensor<2x3x16xi{bits}>"
    text = f"""
    #map = affine_map<(a, b, c) -> (a, b, c)>
    func.func @f(%packed: tensor<2x3x{2 * bits}xi8>) -> tensor<2x3x16xi32> {{
      %codes = flow.tensor.bitcast %packed : tensor<2x3x{2 * bits}xi8> -> {kinds}
      %empty = tensor.empty() : tensor<2x3x16xi32>
      %wide = linalg.generic {{indexing_maps = [#map, #map], iterator_types = ["parallel", "parallel", "parallel"]}}
          ins(%codes : {kinds}) outs(%empty : tensor<2x3x16xi32>) {{
      ^bb0(%code: i{bits}, %out: i32):
        %value = arith.{"extsi" if signed else "extui"} %code : i{bits} to i32
        linalg.yield %value : i32
      }} -> tensor<2x3x16xi32>
      return %wide : tensor<2x3x16xi32>
    }}"""
    options = ["--iree-llvmcpu-target-cpu=generic"]
    binary = compiler.compile_str(text, target_backends=["llvm-cpu"], extra_args=options)
    context = runtime.SystemContext(config=runtime.Config("local-task"))
    context.add_vm_module(runtime.VmModule.copy_buffer(context.instance, binary))
    found = context.modules.module["f"](packed.numpy()).to_host()
    assert np.array_equal(found.reshape(2, 48), codes.numpy().astype(np.int32))


def test_the_golden_of_torch_mlir_is_read() -> None:
    """The first rows of test/Dialect/TorchConversion/unpack-quant-tensor.mlir."""
    packed = torch.tensor([[57, 128, 249, 244], [7, 243, 27, 15]], dtype=torch.uint8)
    expected = [[9, 3, 0, 8, 9, 15, 4, 15], [7, 0, 3, 15, 11, 1, 15, 0]]
    rhs = pack_matmul_rhs(torch.tensor(expected, dtype=torch.uint8), torch.ones(2, 4), None, 4)
    assert torch.equal(rhs.rhs, packed)
    assert (rhs.bit_width, rhs.group_size) == (4, 2)
    assert unpack_groups(packed.view(torch.int8)[:, None], 4, signed=False).tolist() == expected


@pytest.mark.parametrize("asymmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("bits", "signed"), ALL)
def test_the_operator_gets_the_values(bits: int, signed: bool, dtype: torch.dtype, asymmetric: bool) -> None:
    codes, scale = every_code(bits, signed, (4, 64)), torch.randn(4, 2).to(dtype)
    zero = every_code(bits, signed, (4, 2)) if asymmetric else None
    packed = pack_matmul_rhs(codes, scale, zero, bits)
    assert packed.scale.shape == packed.zero_point.shape == (4, 2, 1)
    assert packed.scale.dtype == packed.zero_point.dtype == dtype
    # As the operator reads it: every byte split low bits first, taken as unsigned.
    width = packed.bit_width
    split = [[byte >> shift & (1 << width) - 1 for byte in row for shift in range(0, 8, width)] for row in packed.rhs]
    rhs = torch.tensor(split, dtype=torch.float64).view(4, 2, 32)
    values = (rhs - packed.zero_point.double()) * packed.scale.double()
    expected = codes.double().view(4, 2, 32) - (0 if zero is None else zero.double()[..., None])
    assert torch.equal(values, expected * scale.double()[..., None])
    back = unpack_matmul_rhs(packed, signed)
    assert torch.equal(back[0], codes)
    assert torch.equal(back[1], scale)
    assert torch.equal(back[2], torch.zeros_like(scale) if zero is None else zero.to(dtype))


def test_what_does_not_fit_is_refused() -> None:
    codes = every_code(4, True, (2, 12))
    for group in (5, 3, 0):
        with pytest.raises(SpecError, match=f"groups of {group} codes of 4 bits"):
            pack_groups(codes, group, 4)
    with pytest.raises(SpecError, match="the value 7 lies outside -2 to 1"):
        pack_groups(torch.full((2, 8), 7, dtype=torch.int8), 8, 2)
    with pytest.raises(SpecError, match=r"int8 \[N, groups, bytes\]"):
        unpack_groups(torch.zeros(2, 8, dtype=torch.uint8), 4, True)
    with pytest.raises(SpecError, match="groups dividing K"):
        pack_matmul_rhs(codes, torch.ones(2, 5), None, 4)
    with pytest.raises(SpecError, match="they must be equal"):
        pack_matmul_rhs(codes, torch.ones(2, 2), torch.ones(2, 1), 4)
    with pytest.raises(SpecError, match=r"a zero-point plus 8 is no torch\.float16"):
        pack_matmul_rhs(codes, torch.ones(2, 2).half(), torch.full((2, 2), 1e-3).half(), 4)
