"""How weights lie in the files: tensors that are read and packed as they are written, and read back.

ONNX packs sub-byte integers as `qcompile.numerics.packing` does: without padding between rows, elements in row-major
order, the first in the lowest bits (onnx/onnx.proto, TensorProto.raw_data). 8-bit floats lie as their bit patterns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import onnx_ir as ir
import torch
from onnx_ir.tensor_adapters import TorchTensor
from torch import Tensor

from qcompile.numerics.packing import from_unsigned, pack, unpack

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


def lazy(name: str, read: Callable[[], Tensor], dtype: ir.DataType, shape: tuple[int, ...]) -> ir.LazyTensor:
    """A tensor of the model that is read, and packed where `dtype` is narrower than a byte, when it is written."""

    def make() -> Any:
        tensor = read()
        if dtype.bitwidth < 8:
            return ir.PackedTensor(pack(tensor, dtype.bitwidth).numpy(), dtype, shape=shape, name=name)
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
    dtype = tensor.dtype
    signed = dtype in (ir.DataType.INT2, ir.DataType.INT4, ir.DataType.INT8)
    data = torch.frombuffer(bytearray(tensor.tobytes()), dtype=torch.uint8)
    codes = unpack(data, dtype.bitwidth, shape, signed)
    if layout == "transposed":
        return codes.t().contiguous()
    if layout in ("pairs signed", "pairs unsigned"):
        codes = torch.stack([codes & 15, codes >> 4], -1).flatten(-2)
        return from_unsigned(codes, 4, layout == "pairs signed")
    return codes
