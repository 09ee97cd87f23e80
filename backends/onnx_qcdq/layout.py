"""From a scale of the program's convention (rank of the tensor, each dim dividing) to ONNX's axis and block_size."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How one scale tensor is given to DequantizeLinear.

    `shape` is the scale's in ONNX: () per tensor, (n,) per index of `axis`, the tensor's rank when blocked.
    `repeats` says how often the scale is repeated along each axis: ONNX blocks one axis only.
    """

    axis: int
    block_size: int
    shape: tuple[int, ...]
    repeats: tuple[tuple[int, int], ...] = ()

    @property
    def per_tensor(self) -> bool:
        return not self.shape

    @property
    def blocked(self) -> bool:
        return self.block_size > 0

    def apply(self, parameter: Tensor) -> Tensor:
        """The scale or zero-point as ONNX takes it."""
        for axis, times in self.repeats:
            parameter = parameter.repeat_interleave(times, dim=axis)
        return parameter.reshape(self.shape).contiguous()


PER_TENSOR = Layout(0, 0, ())


def layout_of(shape: Sequence[int], scale_shape: Sequence[int], prefer: int | None = None) -> Layout:
    """The layout of a scale of `scale_shape` for a tensor of `shape` (both static, of one rank).

    Of several axes with blocks, `prefer` stays blocked if it is one of them, else that of the largest block: repeating
    along the others then makes the fewest copies.

    >>> layout_of((64, 256), (64, 1))
    Layout(axis=0, block_size=0, shape=(64,), repeats=())
    >>> layout_of((64, 256), (64, 8))
    Layout(axis=1, block_size=32, shape=(64, 8), repeats=())
    """
    full = [axis for axis, n in enumerate(scale_shape) if n > 1]
    if not full:
        return PER_TENSOR
    if len(full) == 1 and scale_shape[full[0]] == shape[full[0]]:
        return Layout(full[0], 0, (shape[full[0]],))
    blocks = [n // s for n, s in zip(shape, scale_shape, strict=True)]
    shared = [axis for axis, block in enumerate(blocks) if block > 1]
    kept = max(shared, key=lambda axis: (axis == prefer, blocks[axis], axis), default=len(shape) - 1)
    repeats = tuple((axis, blocks[axis]) for axis in shared if axis != kept)
    stored = tuple(s if axis == kept else n for axis, (n, s) in enumerate(zip(shape, scale_shape, strict=True)))
    return Layout(kept, blocks[kept], stored, repeats)
