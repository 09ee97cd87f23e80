"""How weights lie in the parameter files: codes packed or one a byte, and what is known of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

import torch
from torch import Tensor, fx

from qcompile.backends.torch_mlir.kernels import CONTAINER
from qcompile.backends.torch_mlir.pack import container_bits, pack_groups
from qcompile.ir.program import Program

Packing: TypeAlias = Literal["packed", "unpacked"]

SLICED, DEVICE = "sliced", "device"
"""Keys in a weight placeholder's meta: (axis, runs) of the weight that it is a part of; the device that it lies on."""


def set_container(node: fx.Node, groups: int, bits: int, packing: Packing) -> None:
    """Say that codes ``[…, K]`` are stored as ``[…, groups, K / groups]`` in the narrowest integers that hold them."""
    *rows, inputs = node.meta["val"].shape
    width = container_bits(bits) if packing == "packed" else 8
    size = inputs // groups
    if size * width % 8:
        width = 8  # a group must fill whole bytes
    node.meta[CONTAINER] = (width, (*rows, groups, size))


@dataclass(frozen=True)
class Stored:
    """One tensor as it is written: bytes in the dtype and shape of a safetensors entry."""

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    node: fx.Node

    @property
    def nbytes(self) -> int:
        return int(torch.Size(self.shape).numel()) * self.dtype.itemsize


def stored(node: fx.Node, key: str) -> Stored:
    """What a weight placeholder becomes in a file."""
    value = node.meta["val"]
    if CONTAINER not in node.meta:
        return Stored(key, value.dtype, tuple(value.shape), node)
    width, (*rows, groups, size) = node.meta[CONTAINER]
    return Stored(key, torch.int8, (*rows, groups, size * width // 8), node)


def read(program: Program, item: Stored) -> Tensor:
    """The tensor to write."""
    tensor = program.weight(item.node)
    if CONTAINER not in item.node.meta:
        return tensor.contiguous()
    width, (*_, size) = item.node.meta[CONTAINER]
    flat = tensor.reshape(-1, tensor.shape[-1])
    if width == 8:
        return tensor.contiguous().view(torch.int8).view(item.shape)
    return pack_groups(flat, size, width).view(item.shape)
