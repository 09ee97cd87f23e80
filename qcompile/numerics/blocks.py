"""The block structure that a scale's shape implies, and cache-sized tiles to walk it in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

from torch import Tensor

from qcompile.errors import SpecError

Slices = tuple[slice, ...]

FEW_SCALES = 24
CHUNK_SCALES = 1 << 16
"""Scales are many where there is more than one for `FEW_SCALES` entries; then `CHUNK_SCALES` are taken at a time."""

TILE_ELEMENTS = 1 << 16
"""Elements in a tile: float32 input, float32 temporary and codes of one tile stay in a 1 MiB cache."""


def check_scale(shape: Sequence[int], scale_shape: Sequence[int]) -> None:
    """SpecError unless `scale_shape` has the rank of `shape` and each of its dims divides it."""
    fits = len(shape) == len(scale_shape) and all(
        s == n or s == 1 or (s > 0 and n % s == 0) for n, s in zip(shape, scale_shape, strict=True)
    )
    if not fits:
        raise SpecError(
            f"scale of shape {list(scale_shape)} does not fit a tensor of shape {list(shape)}; "
            "give it the tensor's rank, each dim dividing the tensor's"
        )


def split(x: Tensor, scale_shape: Sequence[int]) -> Tensor:
    """View `x` with each grouped axis as two: the group, and the place in it. Axes with one or every scale stay."""
    shape: list[int] = []
    for size, scales in zip(x.shape, scale_shape, strict=True):
        shape += [scales, size // scales] if 1 < scales < size else [size]
    return x.view(shape)


def spread(scale: Tensor, shape: Sequence[int]) -> Tensor:
    """View `scale` so that it broadcasts against `split` of a tensor of `shape`."""
    for axis in reversed(range(scale.dim())):
        if 1 < scale.shape[axis] < shape[axis]:
            scale = scale.unsqueeze(axis + 1)
    return scale


def inner_axes(shape: Sequence[int], scale_shape: Sequence[int]) -> list[int]:
    """The axes of the `split` view that run inside a block: reducing them leaves one entry per scale."""
    axes: list[int] = []
    place = 0
    for size, scales in zip(shape, scale_shape, strict=True):
        if 1 < scales < size:
            place += 1
            axes.append(place)
        elif scales < size:
            axes.append(place)
        place += 1
    return axes


def rows(x: Tensor, scale_shape: Sequence[int]) -> Tensor:
    """`x` as [scales, entries of a block]; a copy where the layout asks for one."""
    view = split(x, scale_shape)
    inner = inner_axes(x.shape, scale_shape)
    outer = [axis for axis in range(view.dim()) if axis not in inner]
    return view.permute([*outer, *inner]).reshape(math.prod(scale_shape), -1)


def row_chunks(shape: Sequence[int], scale_shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first axis, where it has one scale an index, in which what is computed per scale stays small.

    One slice where scales are few: their own arithmetic then costs nothing.
    """
    count = shape[0] if shape and scale_shape[0] == shape[0] else 1
    few = math.prod(scale_shape) * FEW_SCALES <= math.prod(shape)
    step = count if few or count == 0 else max(1, CHUNK_SCALES * count // math.prod(scale_shape))
    if step >= count:
        yield slice(None)
        return
    for start in range(0, count, step):
        yield slice(start, start + step)


def tiles(
    shape: Sequence[int], scale_shape: Sequence[int], *, whole_blocks: bool = False, elements: int = TILE_ELEMENTS
) -> Iterator[tuple[Slices, Slices]]:
    """Slices of a tensor of `shape` and of its scale that cover it in tiles of about `elements` or fewer entries.

    A tile holds whole groups; where one scale spans an axis, that axis may be cut unless `whole_blocks`. A tile is
    larger than `elements` where one block is.
    """
    yield from _tiles(tuple(shape), tuple(scale_shape), 0, whole_blocks, elements)


def _tiles(
    shape: tuple[int, ...], scale_shape: tuple[int, ...], axis: int, whole_blocks: bool, elements: int
) -> Iterator[tuple[Slices, Slices]]:
    rest = math.prod(shape[axis:])
    if axis == len(shape) or rest <= elements:
        everything = (slice(None),) * (len(shape) - axis)
        yield everything, everything
        return
    size, scales = shape[axis], scale_shape[axis]
    cuttable = scales == 1 and not whole_blocks
    block = 1 if cuttable else size // scales
    step = max(1, elements // (rest // size) // block) * block
    # One step is the least this axis can be cut into; where even that is too much, the next axis is cut as well.
    smaller = max(1, elements // block)
    deeper = list(_tiles(shape, scale_shape, axis + 1, whole_blocks, smaller)) if step == block else None
    for start in range(0, size, step):
        here = slice(start, start + step)
        there = slice(None) if scales == 1 else slice(start // block, (start + step) // block)
        if deeper is None:
            everything = (slice(None),) * (len(shape) - axis - 1)
            yield (here, *everything), (there, *everything)
        else:
            for inner, inner_scale in deeper:
                yield (here, *inner), (there, *inner_scale)
