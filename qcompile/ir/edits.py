"""Edits of weights that compose and round once.

    source ─→ float32 ─→ edit ─→ edit ─→ … ─→ stored dtype            (float64 where the weight is float64)

A `WeightEdit` says along which one axis it mixes or scales. Edits in a row that leave an axis alone are computed in
pieces along that axis, straight into the result: there is never a whole weight in float32 beside it.
"""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.ir.threads import in_order

T = TypeVar("T")

PIECE_BYTES = 2 << 20
"""Size of a piece in float32: one that stays in the processor's cache from edit to edit."""

_KEPT = 16 << 20
"""Bytes of a buffer up to which a thread keeps it for the next piece: new memory costs more than the arithmetic."""

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

    def apply_into(self, tensor: Tensor, spare: Tensor) -> Tensor:
        """As `apply`, but both may be changed, and the result may lie in either; both are contiguous.

        `spare` is of tensor's shape and dtype. Worth writing for an edit that then needs no new memory.
        """
        return self.apply(tensor)

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

    Pieces are computed in as many threads as torch has.

    Raises:
        QCompileError: a float16 weight outgrows its type.
        RuntimeError: an edit returns another shape than it declares.
    """
    runs = _runs(edits, tensor.ndim)
    if not runs:
        return tensor
    with _between(runs[:-1], tensor, piece_bytes) as current:
        return _applied(runs[-1], current, tensor.dtype, piece_bytes)


def edited_pieces(chain: Chain, tensor: Tensor, piece_bytes: int = PIECE_BYTES) -> Iterator[Tensor]:
    """What `apply_edits` gives, in consecutive pieces along axis 0; each holds until the next one is asked for.

    A few are made ahead of what is asked for. It is one piece where the last edits mix along axis 0.
    """
    runs = _runs(chain.edits, tensor.ndim)
    if not runs or 0 not in _free(runs[-1], tensor.ndim):
        yield apply_edits(chain.edits, tensor, piece_bytes)
        return
    with _between(runs[:-1], tensor, piece_bytes) as current:
        yield from _pieces(runs[-1], current, tensor.dtype, piece_bytes)


def _pieces(run: Sequence[WeightEdit], current: Tensor, dtype: torch.dtype, piece_bytes: int) -> Iterator[Tensor]:
    """One run that leaves axis 0 alone, in pieces of `dtype`."""
    *_, shape = _shapes(run, tuple(current.shape))
    rows = current.shape[0]
    step = max(1, piece_bytes // max(1, _largest(run, tuple(current.shape)) // max(1, rows) * 4))
    free: deque[Tensor] = deque()

    def made(start: int) -> tuple[Tensor, int]:
        count = min(step, rows - start)
        try:
            result = free.popleft()
        except IndexError:
            result = torch.empty((min(step, rows), *shape[1:]), dtype=dtype, device=current.device)
        _fill_all(result[:count], run, current.narrow(0, start, count), piece_bytes)
        return result, count

    for result, count in _each(current, [partial(made, start) for start in range(0, rows, step)]):
        yield result[:count]
        free.append(result)


@contextmanager
def _between(runs: Sequence[Sequence[WeightEdit]], tensor: Tensor, piece_bytes: int) -> Iterator[Tensor]:
    """`tensor` after some runs with more to come: nothing is rounded."""
    buffer: Tensor | None = None
    for run in runs:
        *_, shape = _shapes(run, tuple(tensor.shape))
        dtype, done = _work(tensor.dtype), buffer
        buffer = _large(math.prod(shape) * dtype.itemsize, tensor.device)
        result = buffer[: math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        _fill_all(result, run, tensor, piece_bytes)
        tensor = result
        _give_back(done)
    yield tensor
    _give_back(buffer)


def _applied(run: Sequence[WeightEdit], tensor: Tensor, dtype: torch.dtype, piece_bytes: int) -> Tensor:
    """`tensor` after one run, in `dtype`."""
    *_, shape = _shapes(run, tuple(tensor.shape))
    result = torch.empty(shape, dtype=dtype, device=tensor.device)
    _fill_all(result, run, tensor, piece_bytes)
    return result


def _fill_all(result: Tensor, run: Sequence[WeightEdit], tensor: Tensor, piece_bytes: int) -> None:
    boxes = _boxes(run, tensor, piece_bytes)
    for _ in _each(tensor, [partial(_fill, _part(result, box), run, _part(tensor, box)) for box in boxes]):
        pass


def _each(tensor: Tensor, tasks: Sequence[Callable[[], T]]) -> Iterator[T]:
    """What tasks on parts of `tensor` give; a device orders its work itself."""
    return in_order(tasks) if tensor.device.type == "cpu" else (task() for task in tasks)


def _work(dtype: torch.dtype) -> torch.dtype:
    """What edits of a weight are computed in."""
    return torch.float64 if dtype == torch.float64 else torch.float32


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


def _fill(result: Tensor, run: Sequence[WeightEdit], tensor: Tensor) -> None:
    """Write the edited `tensor` into `result`, cast to its dtype."""
    with _buffers(_largest(run, tuple(tensor.shape)), tensor) as (first, second):
        current = first[: tensor.numel()].view(tensor.shape).copy_(tensor)
        for edit in run:
            wanted = tuple(edit.out_shape(tuple(current.shape)))
            current = current.to(first.dtype).contiguous()
            spare = second if same_memory(current, first) else first
            current = edit.apply_into(current, spare[: current.numel()].view(current.shape))
            if tuple(current.shape) != wanted:
                raise RuntimeError(f"{edit} returned {list(current.shape)}, declared {list(wanted)}")
        result.copy_(current)
        if result.dtype == torch.float16 and bool((result.isinf() & current.isfinite()).any()):
            peak = float(current.abs().nan_to_num(posinf=0.0).max())
            raise QCompileError(f"an edited weight reaches {peak:.3g}, beyond float16; capture with dtype=bfloat16")


def same_memory(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are, or are parts of, one allocation."""
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


@contextmanager
def large_buffers_kept() -> Iterator[None]:
    """Until the block ends this thread keeps the memory of weights between runs of edits for the next weight."""
    _kept.scopes += 1
    try:
        yield
    finally:
        _kept.scopes -= 1
        if not _kept.scopes:
            _kept.between = None


def _large(size: int, device: torch.device) -> Tensor:
    held, _kept.between = _kept.between, None
    return held if held is not None and held.numel() >= size and held.device == device else _new(size, device)


def _give_back(buffer: Tensor | None) -> None:
    if _kept.scopes and buffer is not None:
        _kept.between = buffer


class _Kept(threading.local):
    """The buffers of a thread that are not in use, uint8."""

    def __init__(self) -> None:
        self.buffers: list[Tensor] = []
        self.between: Tensor | None = None
        self.scopes = 0


_kept = _Kept()


@contextmanager
def _buffers(count: int, like: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Two buffers of at least `count` elements, in the dtype that edits of `like` are computed in."""
    dtype = _work(like.dtype)
    size = count * dtype.itemsize
    kept = _kept.buffers if like.device.type == "cpu" and size <= _KEPT else []
    pair = []
    for _ in range(2):
        buffer = kept.pop() if kept else None
        pair.append(_new(size, like.device) if buffer is None or buffer.numel() < size else buffer)
    yield pair[0][:size].view(dtype), pair[1][:size].view(dtype)
    kept += pair


def _new(size: int, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # it may outlive the mode
        return torch.empty(size, dtype=torch.uint8, device=device)
