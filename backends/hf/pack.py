"""What every layout of this room takes and gives, and the four-bit floats of compressed-tensors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.packing import pack, unpack


@dataclass(frozen=True, eq=False)
class Grouped:
    """A linear's weight in codes.

    - `codes` `[out, in]`, int8 where the element is signed, else uint8.
    - `scale` `[out, groups]`, any float dtype; it is stored as it is.
    - `zero_point` `[out, groups]` of the codes' dtype, None where the spec is symmetric.
    - `group_index` `[in]`, int32: the group of each input; None where inputs lie in order, in groups of equal size.

    Raises SpecError where shapes or dtypes do not fit one another.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor | None = None
    group_index: Tensor | None = None

    def __post_init__(self) -> None:
        if self.codes.dim() != 2 or self.scale.dim() != 2 or len(self.codes) != len(self.scale):
            raise SpecError(
                f"codes {list(self.codes.shape)} and scale {list(self.scale.shape)} are not [out, in] and "
                "[out, groups]; reshape them first"
            )
        zero = self.zero_point
        if zero is not None and (zero.shape != self.scale.shape or zero.dtype != self.codes.dtype):
            raise SpecError(
                f"the zero-point, {zero.dtype}{list(zero.shape)}, has not the scale's shape {list(self.scale.shape)} "
                f"and the codes' dtype {self.codes.dtype}; use zero=int"
            )
        inputs, groups = self.codes.shape[1], self.scale.shape[1]
        if self.group_index is None and inputs % groups:
            raise SpecError(f"{groups} groups do not divide {inputs} inputs; give group_index, or another group size")
        if self.group_index is not None:
            _check_index(self.group_index, inputs, groups)

    def zeros(self, symmetric: bool) -> Tensor:
        """The zero-points, 0 where there are none; SpecError unless there are some just where not `symmetric`."""
        if (self.zero_point is None) != symmetric:
            found = "none is given" if self.zero_point is None else "one is given"
            raise SpecError(f"symmetric is {symmetric} and {found} as zero-point; symmetric weights alone have none")
        return self.codes.new_zeros(self.scale.shape) if self.zero_point is None else self.zero_point


def ordered_index(inputs: int, groups: int, device: torch.device | None = None) -> Tensor:
    """The group of each input where inputs lie in order: int32 `[inputs]`."""
    return torch.arange(groups, dtype=torch.int32, device=device).repeat_interleave(inputs // groups)


def pack_fp4(codes: Tensor) -> Tensor:
    """e2m1 codes `[out, in]`, uint8, as uint8 `[out, in / 2]`: the first of two in the low half (`weight_packed`).

    So compressed-tensors lays out nvfp4-pack-quantized and mxfp4-pack-quantized. The scales stand beside, one a group:
    `weight_scale` e4m3 `[out, in / 16]` and `weight_global_scale` float32 `[1]`, or e8m0 as uint8 `[out, in / 32]`.

    Raises SpecError for an odd number of inputs, and for a code above 15.
    """
    if codes.dtype != torch.uint8 or codes.shape[-1] % 2:
        raise SpecError(
            f"codes of four-bit floats are uint8 with an even number of inputs, not {codes.dtype}{list(codes.shape)}"
        )
    return pack(codes, 4).view(*codes.shape[:-1], codes.shape[-1] // 2)


def unpack_fp4(packed: Tensor) -> Tensor:
    """The inverse of `pack_fp4`: every byte is valid, so nothing but the dtype is refused."""
    return unpack(packed, 4, (*packed.shape[:-1], 2 * packed.shape[-1]), signed=False)


def _check_index(index: Tensor, inputs: int, groups: int) -> None:
    if index.dtype != torch.int32 or index.shape != (inputs,):
        raise SpecError(f"group_index is {index.dtype}{list(index.shape)}, not int32 [{inputs}]; one group an input")
    if inputs and (int(index.min()) < 0 or int(index.max()) >= groups):
        raise SpecError(f"group_index names groups {int(index.min())} to {int(index.max())}; there are {groups}")
