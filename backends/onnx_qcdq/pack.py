"""How weights lie in the files: tensors that are read and packed as they are written, and read back.

ONNX packs sub-byte integers without padding between rows: elements in row-major order, the first in the lowest bits
(onnx/onnx.proto, TensorProto.raw_data); a last byte that is not full is filled with zeros.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

WEIGHT, LAYOUT = "qcompile.weight", "qcompile.layout"
"""Metadata of an initializer that holds a weight's codes: its name, and how they lie compared with the program's."""

_CONTAINERS = {
    (2, True): ir.DataType.INT2,
    (2, False): ir.DataType.UINT2,
    (4, True): ir.DataType.INT4,
    (4, False): ir.DataType.UINT4,
    (8, True): ir.DataType.INT8,
    (8, False): ir.DataType.UINT8,
}


def container(bits: int, signed: bool, opset: int) -> ir.DataType:
    """The smallest ONNX integer that holds codes of `bits`; two-bit ones exist from opset 25 on.

    >>> container(3, True, 21).name
    'INT4'
    """
    width = 2 if bits <= 2 and opset >= 25 else 4 if bits <= 4 else 8
    return _CONTAINERS[width, signed]


def pack(codes: Tensor, bits: int) -> NDArray[np.uint8]:
    """int8 or uint8 `codes` as bytes, 8 / `bits` a byte (2 or 4 bits), the first in the lowest bits."""
    per_byte = 8 // bits
    flat = codes.contiguous().reshape(-1).view(torch.uint8).numpy() & np.uint8((1 << bits) - 1)
    if rest := -len(flat) % per_byte:
        flat = np.concatenate([flat, np.zeros(rest, np.uint8)])
    packed = flat[0::per_byte].copy()
    for place in range(1, per_byte):
        packed |= flat[place::per_byte] << np.uint8(bits * place)
    return packed


def unpack(packed: NDArray[np.uint8], bits: int, signed: bool, shape: tuple[int, ...]) -> Tensor:
    """The inverse of `pack`: int8 or uint8 codes of `shape`."""
    mask = np.uint8((1 << bits) - 1)
    planes = [(packed >> np.uint8(bits * place)) & mask for place in range(8 // bits)]
    flat = np.stack(planes, axis=1).reshape(-1)[: int(np.prod(shape))]
    if signed:
        half = 1 << (bits - 1)
        flat = ((flat.astype(np.int16) ^ half) - half).astype(np.int8)
    return torch.from_numpy(np.ascontiguousarray(flat.reshape(shape)))


def lazy(name: str, read: Callable[[], Tensor], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    """A tensor of the model that is read, and packed where `dtype` is narrower than a byte, when it is written."""

    def make() -> Any:
        tensor = read()
        if dtype.bitwidth < 8:
            return ir.PackedTensor(pack(tensor, dtype.bitwidth), dtype, shape=shape, name=name)
        return TorchTensor(tensor.contiguous(), name=name)

    return ir.LazyTensor(make, dtype=dtype, shape=ir.Shape(shape), name=name)


def stored_codes(directory: Path) -> Iterator[tuple[str, Tensor]]:
    """(weight name, codes in the program's layout) of every quantized weight in an artifact, one at a time."""
    model = ir.load(directory / "model.onnx")
    for value in model.graph.initializers.values():
        name, tensor = value.metadata_props.get(WEIGHT), value.const_value
        if name is None or tensor is None:
            continue
        yield name, _codes(tensor, value.metadata_props[LAYOUT])
        if isinstance(tensor, ir.ExternalTensor):
            tensor.release()


def _codes(tensor: Any, layout: str) -> Tensor:
    shape = tuple(int(size) for size in tensor.shape)
    signed = tensor.dtype in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)
    if tensor.dtype.bitwidth < 8:
        packed = np.frombuffer(tensor.tobytes(), dtype=np.uint8)
        codes = unpack(packed, tensor.dtype.bitwidth, signed, shape)
    else:
        codes = torch.from_numpy(np.array(tensor.numpy()))
    if layout == "transposed":
        return codes.t().contiguous()
    if layout in ("pairs signed", "pairs unsigned"):
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return (codes.to(torch.int16) - 8).to(torch.int8) if layout == "pairs signed" else codes
    return codes
