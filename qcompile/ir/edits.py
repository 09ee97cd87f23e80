"""Edits of weights that compose and round once.

    source ─→ float32 ─→ edit ─→ edit ─→ … ─→ stored dtype            (float64 where the weight is float64)

A `WeightEdit` says along which one axis it mixes or scales. Edits in a row that leave an axis alone are computed in
pieces along that axis, straight into the result: there is never a whole weight in float32 beside it.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import QCompileError

PIECE_BYTES = 4 << 20
"""Size of a piece in float32: one that stays in the processor's cache from edit to edit. What an edit itself allocates
comes to a few times that."""

EDITABLE = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
"""Element types whose weights take edits; others hold codes."""

Box = tuple[tuple[int, int, int], ...]
"""Part of a tensor: (axis, start, length) for each axis that is cut."""


@dataclass(frozen=True, eq=False)
class WeightEdit(ABC):
    """A linear or elementwise change of a weight, applied whenever the weight is read.

    Args:
        axis: the axis along which it mixes or scales. For every index of the other axes it does the same, each by
            itself, so it may be given any part of them at a time. None: it needs the whole weight.
    """

    axis: int | None

    @abstractmethod
    def apply(self, tensor: Tensor) -> Tensor:
        """The weight after the edit: float32 from float32, float64 from float64. `tensor` must not be changed."""

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape after the edit. With an axis, only the size of that axis may change."""
        return shape


@dataclass(frozen=True, eq=False)
class AlongAxis(WeightEdit):
    """Apply `fn` to every vector along an axis.

    Args:
        fn: takes ``[…, n]`` and returns ``[…, width]``, vectors in the last axis, in the dtype it was given.
        width: the new size of the axis, where it changes.

    >>> flip = AlongAxis(0, lambda vectors: vectors.flip(-1))
    >>> apply_edits((flip,), torch.tensor([[1.0, 2.0], [3.0, 4.0]]))
    tensor([[3., 4.],
            [1., 2.]])
    """

    axis: int
    fn: Callable[[Tensor], Tensor]
    width: int | None = None

    def apply(self, tensor: Tensor) -> Tensor:
        """`fn` along the axis."""
        return self.fn(tensor.movedim(self.axis, -1)).movedim(-1, self.axis)

    def out_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape with `width` in place of the axis."""
        sizes = list(shape)
        sizes[self.axis] = sizes[self.axis] if self.width is None else self.width
        return tuple(sizes)


@dataclass(frozen=True, eq=False)
class Chain:
    """Edits in a row, with one rounding behind them."""

    edits: tuple[WeightEdit, ...]

    def __call__(self, tensor: Tensor) -> Tensor:
        return apply_edits(self.edits, tensor)

    def then(self, edit: WeightEdit) -> Chain:
        """The chain with one more edit behind it."""
        return Chain((*self.edits, edit))


def checked_shape(edit: WeightEdit, shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape after `edit`. Raises ValueError where its axis does not exist or another axis changes."""
    axis = edit.axis
    if axis is not None and not -len(shape) <= axis < len(shape):
        raise ValueError(f"{type(edit).__name__} acts along axis {axis} of a weight of shape {list(shape)}")
    after = tuple(edit.out_shape(shape))
    if axis is not None:
        kept = [index for index in range(len(shape)) if index != axis % len(shape)]
        if len(after) != len(shape) or any(after[index] != shape[index] for index in kept):
            raise ValueError(
                f"{type(edit).__name__} makes {list(after)} of {list(shape)}, more than its axis {axis} changes"
            )
    return after


def apply_edits(edits: Sequence[WeightEdit], tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Tensor:
    """`tensor` after all edits in its own dtype, rounded once; float64 is computed in float64, others in float32.

    Raises:
        QCompileError: a float16 weight outgrows its type.
        RuntimeError: an edit returns another shape than it declares.
    """
    work = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    current, runs = tensor, _runs(edits, tensor.ndim)
    for number, run in enumerate(runs, 1):
        *_, shape = _shapes(run, tuple(current.shape))
        result = torch.empty(shape, dtype=tensor.dtype if number == len(runs) else work, device=tensor.device)
        for box in _boxes(run, current, piece_bytes):
            _fill(_part(result, box), run, _part(current, box), work)
        current = result
    return current


def edited_pieces(chain: Chain, tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[Tensor]:
    """What `apply_edits` gives, in consecutive pieces along axis 0, each made when it is asked for.

    It is one piece where the edits mix along axis 0.
    """
    if len(_runs(chain.edits, tensor.ndim)) > 1 or 0 not in _free(chain.edits, tensor.ndim):
        yield apply_edits(chain.edits, tensor, piece_bytes)
        return
    row = _largest(chain.edits, tuple(tensor.shape)) // max(1, tensor.shape[0]) * 4
    step = max(1, piece_bytes // max(1, row))
    for start in range(0, tensor.shape[0], step):
        part = tensor.narrow(0, start, min(step, tensor.shape[0] - start))
        yield apply_edits(chain.edits, part, piece_bytes)


def _runs(edits: Sequence[WeightEdit], rank: int) -> list[list[WeightEdit]]:
    """The edits in order, split so that those of one run leave a common axis alone wherever that can be."""
    runs: list[list[WeightEdit]] = []
    for edit in edits:
        if runs and _free([*runs[-1], edit], rank):
            runs[-1].append(edit)
        else:
            runs.append([edit])
    return runs


def _free(edits: Sequence[WeightEdit], rank: int) -> list[int]:
    """Axes that every edit leaves alone."""
    if any(edit.axis is None for edit in edits):
        return []
    mixed = {edit.axis % rank for edit in edits if edit.axis is not None}
    return [axis for axis in range(rank) if axis not in mixed]


def _shapes(run: Sequence[WeightEdit], shape: tuple[int, ...]) -> list[tuple[int, ...]]:
    shapes = [shape]
    for edit in run:
        shapes.append(tuple(edit.out_shape(shapes[-1])))
    return shapes


def _largest(run: Sequence[WeightEdit], shape: tuple[int, ...]) -> int:
    """Elements of the largest tensor on the way through a run."""
    return max(math.prod(each) for each in _shapes(run, shape))


def _boxes(run: Sequence[WeightEdit], tensor: Tensor, piece_bytes: int) -> Iterator[Box]:
    """Parts that tile the tensor along axes the run leaves alone, of `piece_bytes` in float32 where that can be."""
    shape, free = tuple(tensor.shape), _free(run, tensor.ndim)

    def cut(size: int, axes: list[int]) -> Iterator[Box]:
        if size * 4 <= piece_bytes or not axes:
            yield ()
            return
        axis, *rest = axes
        each = size // shape[axis]
        step = max(1, min(shape[axis], piece_bytes // 4 // max(1, each)))
        for start in range(0, shape[axis], step):
            length = min(step, shape[axis] - start)
            for box in cut(each * length, rest):
                yield (axis, start, length), *box

    return cut(_largest(run, shape), free)


def _part(tensor: Tensor, box: Box) -> Tensor:
    for axis, start, length in box:
        tensor = tensor.narrow(axis, start, length)
    return tensor


def _fill(result: Tensor, run: Sequence[WeightEdit], tensor: Tensor, work: torch.dtype) -> None:
    """Write the edited `tensor` into `result`, cast to its dtype."""
    for edit in run:
        wanted = tuple(edit.out_shape(tuple(tensor.shape)))
        tensor = edit.apply(tensor.to(work))
        if tuple(tensor.shape) != wanted:
            raise RuntimeError(f"{edit} returned {list(tensor.shape)}, declared {list(wanted)}")
    result.copy_(tensor)
    if result.dtype == torch.float16 and bool((result.isinf() & tensor.isfinite()).any()):
        peak = float(tensor.abs().nan_to_num(posinf=0.0).max())
        raise QCompileError(f"an edited weight reaches {peak:.3g}, beyond float16; capture with dtype=bfloat16")
