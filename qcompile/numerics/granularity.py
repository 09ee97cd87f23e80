"""Which entries of a tensor share one scale.

A scale tensor has the rank of the tensor it belongs to, and each of its dims divides the tensor's: the ratio is the
block. For a weight `[N, K]`: per tensor `[1, 1]`, per channel `[N, 1]`, per group of g `[N, K/g]`, per R x C block
`[N/R, K/C]`; for activations `[b, s, K]`: per token `[b, s, 1]`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeAlias

from qcompile.errors import SpecError


@dataclass(frozen=True)
class PerTensor:
    """One scale for the whole tensor."""

    def __str__(self) -> str:
        return "tensor"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        return (1,) * len(shape)


@dataclass(frozen=True)
class PerChannel:
    """One scale per index along `axes`; more than one axis where channels are stacked, as `[experts, out, in]`."""

    axes: tuple[int, ...]

    def __post_init__(self) -> None:
        if not self.axes or len(set(self.axes)) != len(self.axes):
            raise SpecError(f"channel needs distinct axes, not axis={axis_text(self.axes)}; name each axis once")

    def __str__(self) -> str:
        return "channel"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        kept = {_axis(axis, shape, self) for axis in self.axes}
        return tuple(size if i in kept else 1 for i, size in enumerate(shape))


@dataclass(frozen=True)
class PerToken:
    """One scale per row: every index of all axes but the last."""

    def __str__(self) -> str:
        return "token"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _axis(-1, shape, self)
        return (*shape[:-1], 1)


@dataclass(frozen=True)
class PerGroup:
    """One scale per `size` neighbours along `axis`; the other axes each keep their own."""

    size: int
    axis: int = -1

    def __post_init__(self) -> None:
        if self.size < 1:
            raise SpecError(f"group={self.size} is not a group size; use group=32, or channel for one group per row")

    def __str__(self) -> str:
        return f"group={self.size}"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        axis = _axis(self.axis, shape, self)
        return tuple(_divide(n, self.size, i, shape, self) if i == axis else n for i, n in enumerate(shape))


@dataclass(frozen=True)
class PerBlock:
    """One scale per `rows` x `columns` block of the last two axes; the other axes each keep their own."""

    rows: int
    columns: int

    def __post_init__(self) -> None:
        if self.rows < 1 or self.columns < 1:
            raise SpecError(f"{self} is not a block; both sizes must be at least 1, as in block=128x128")

    def __str__(self) -> str:
        return f"block={self.rows}x{self.columns}"

    def scale_shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        _axis(-2, shape, self)
        last = len(shape) - 1
        rows = _divide(shape[last - 1], self.rows, last - 1, shape, self)
        return (*shape[:-2], rows, _divide(shape[last], self.columns, last, shape, self))


Granularity: TypeAlias = PerTensor | PerChannel | PerToken | PerGroup | PerBlock


def axis_text(axes: Sequence[int]) -> str:
    """`0` or `0,1`, as written after `axis=`."""
    return ",".join(str(axis) for axis in axes)


def _axis(axis: int, shape: Sequence[int], granularity: Granularity) -> int:
    if not -len(shape) <= axis < len(shape):
        raise SpecError(f"{granularity} needs axis {axis}, and a tensor of shape {list(shape)} has none; use tensor")
    return axis % len(shape)


def _divide(size: int, group: int, axis: int, shape: Sequence[int], granularity: Granularity) -> int:
    if size % group != 0:
        where = f"axis {axis} of shape {list(shape)}"
        if not isinstance(size, int):  # symbolic
            raise SpecError(f"{granularity} does not divide {where}, whose size varies; use token, or group= elsewhere")
        near = _nearest_divisors(size, group)
        raise SpecError(f"{granularity} does not divide {where}, whose size is {size}; the nearest divisors are {near}")
    return size // group


def _nearest_divisors(size: int, group: int) -> str:
    divisors = {d for low in range(1, int(size**0.5) + 1) if size % low == 0 for d in (low, size // low)}
    below = max(d for d in divisors if d < group)
    above = [d for d in divisors if d > group]
    return f"{below} and {min(above)}" if above else str(below)
