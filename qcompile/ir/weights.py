"""`WeightStore`: named tensors that are read when touched and let go again.

A weight is bound to a *source* (a tensor in memory, an entry of a safetensors shard) and carries a list of recorded
edits, applied when it is read. Those of `edits.py` compose: a row of them is computed in float32 or better, and rounded
once. What a pass writes is kept in memory up to a budget and spilled to a scratch file beyond it, so a compile never
holds more than that budget plus the tensor at hand.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.ir.edits import EDITABLE, Chain, WeightEdit, checked_shape, edited_pieces

DEFAULT_BUDGET = 256 << 20  # bytes of written tensors kept in memory; more goes to the scratch folder
_SPILL_FROM = 1 << 20  # smaller tensors always stay in memory: a file each would cost more than it frees

Edit = Callable[[Tensor], Tensor]


class TensorSource(Protocol):
    """Where a weight comes from."""

    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> torch.dtype: ...
    def read(self) -> Tensor: ...


@dataclass(frozen=True, eq=False)
class MemorySource:
    """A tensor that is held."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def read(self) -> Tensor:
        return self.tensor


@dataclass(frozen=True)
class ShardSource:
    """An entry of a safetensors file; each read maps the file, and dropping the tensor unmaps it."""

    path: Path
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        from safetensors import safe_open

        with safe_open(self.path, framework="pt") as shard:
            tensor: Tensor = shard.get_tensor(self.name)
        return tensor


@dataclass(frozen=True, eq=False)
class _Entry:
    source: TensorSource
    shape: tuple[int, ...]
    dtype: torch.dtype
    edits: tuple[Edit, ...] = ()


@dataclass(eq=False)
class _Scratch:
    """A temporary folder shared by a store and its copies; it goes when the last of them does."""

    folder: tempfile.TemporaryDirectory[str] | None = None
    count: int = 0

    def write(self, tensor: Tensor) -> ShardSource:
        from safetensors.torch import save_file

        if self.folder is None:
            self.folder = tempfile.TemporaryDirectory(prefix="qcompile-")
        self.count += 1
        path = Path(self.folder.name) / f"{self.count}.safetensors"
        save_file({"tensor": tensor.contiguous()}, path)
        return ShardSource(path, "tensor", tuple(tensor.shape), tensor.dtype)


@dataclass(eq=False)
class WeightStore(MutableMapping[str, Tensor]):
    """Key (fully-qualified name) → tensor. Tensors that come out must not be changed in place.

    >>> store = WeightStore.of({"w": torch.ones(2, 3)})
    >>> store.edit("w", lambda w: 2 * w)
    >>> store["w"].sum().item(), store.meta("w")
    (12.0, ((2, 3), torch.float32))
    """

    budget: int = DEFAULT_BUDGET
    _entries: dict[str, _Entry] = field(default_factory=dict)
    _held: int = 0
    _scratch: _Scratch = field(default_factory=_Scratch)
    _cache: dict[str, Tensor] | None = None

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], budget: int = DEFAULT_BUDGET) -> WeightStore:
        """A store that refers to tensors its caller holds anyway (they don't count against the budget)."""
        store = cls(budget=budget)
        for key, tensor in tensors.items():
            store.bind(key, MemorySource(tensor.detach()))
        return store

    def bind(self, key: str, source: TensorSource) -> None:
        """Bind `key` to a source, read when touched."""
        self._drop(key)
        self._entries[key] = _Entry(source, source.shape, source.dtype)

    def edit(self, key: str, fn: Edit, shape: tuple[int, ...] | None = None, dtype: torch.dtype | None = None) -> None:
        """Record `fn` to be applied whenever `key` is read; say the new shape or dtype where they change.

        It is given the whole weight in its dtype, rounded: what changes numbers is better a `transform`.
        """
        entry = self._entries[key]
        self._entries[key] = replace(
            entry,
            edits=(*entry.edits, fn),
            shape=entry.shape if shape is None else tuple(shape),  # () is a shape
            dtype=dtype or entry.dtype,
        )
        self._forget(key)

    def transform(self, key: str, edit: WeightEdit) -> None:
        """Record an edit. Edits in a row are computed in float32 (float64 where the weight is) and rounded once; what
        is written with ``store[key] = …``, or recorded with `edit`, ends the row.

        Raises QCompileError for a weight that holds integers or codes, ValueError for an axis that it lacks.
        """
        entry = self._entries[key]
        if entry.dtype not in EDITABLE:
            raise QCompileError(
                f"weight {key!r} holds {entry.dtype}, which takes no edits; edit it before it is quantized"
            )
        shape = checked_shape(edit, entry.shape)
        before, chain = _split(entry.edits)
        self._entries[key] = replace(entry, edits=(*before, (chain or Chain(())).then(edit)), shape=shape)
        self._forget(key)

    def alias(self, key: str, other: str) -> None:
        """Bind `key` to what `other` reads now, edits and all; later edits of one are not seen in the other."""
        self._drop(key)
        entry = self._entries[other]
        if isinstance(entry.source, _Held):  # counted once, against the name that was written
            entry = replace(entry, source=MemorySource(entry.source.tensor))
        self._entries[key] = entry

    def meta(self, key: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype, without reading."""
        entry = self._entries[key]
        return entry.shape, entry.dtype

    def nbytes(self, key: str) -> int:
        """Size in bytes, without reading."""
        shape, dtype = self.meta(key)
        return int(torch.Size(shape).numel()) * dtype.itemsize

    def sample(self, key: str, count: int) -> Tensor:
        """About `count` elements of a weight, spread evenly; one that has edits is computed whole for them."""
        entry = self._entries[key]
        flat = (self[key] if entry.edits else entry.source.read()).reshape(-1)
        return flat[:: max(1, len(flat) // count)]

    def identity(self, key: str) -> int:
        """A number that this weight shares with the same one in copies of the store, while none of them changes it."""
        return id(self._entries[key])

    def same_source(self, key: str, other: str) -> bool:
        """Whether both names read one tensor with no edits on either (a tie)."""
        a, b = self._entries[key], self._entries[other]
        return a.source is b.source and not a.edits and not b.edits

    def __getitem__(self, key: str) -> Tensor:
        if self._cache is not None and key in self._cache:
            return self._cache[key]
        entry = self._entries[key]
        tensor = _read(key, entry, entry.edits)
        if tuple(tensor.shape) != entry.shape or tensor.dtype != entry.dtype:
            raise RuntimeError(
                f"weight {key!r} read as {tensor.dtype}{list(tensor.shape)}, declared {entry.dtype}{list(entry.shape)}"
            )
        if self._cache is not None:
            self._cache[key] = tensor
        return tensor

    def pieces(self, key: str) -> Iterator[Tensor]:
        """The weight in consecutive pieces along axis 0, in its dtype: for writing one that is too large to hold twice.

        A piece holds until the next one is asked for. It is one piece where there are no edits, or the last mix axis 0.
        """
        entry = self._entries[key]
        before, chain = _split(entry.edits)
        if chain is None or (self._cache is not None and key in self._cache):
            yield self[key]
            return
        with _named(key):
            yield from edited_pieces(chain, _read(key, entry, before))

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        self._drop(key)
        tensor = tensor.detach()
        size = tensor.numel() * tensor.element_size()
        if size >= _SPILL_FROM and self._held + size > self.budget:
            self.bind(key, self._scratch.write(tensor))
            return
        self._held += size
        self._entries[key] = _Entry(_Held(tensor), tuple(tensor.shape), tensor.dtype)

    def __delitem__(self, key: str) -> None:
        if key not in self._entries:
            raise KeyError(key)
        self._drop(key)

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, key: object) -> bool:
        return key in self._entries

    def copy(self) -> WeightStore:
        """Another store over the same sources; edits and writes in one are not seen in the other."""
        return WeightStore(self.budget, dict(self._entries), self._held, self._scratch)

    @contextmanager
    def caching(self) -> Iterator[None]:
        """Keep what is read until the block ends: for repeated runs of a model that fits in memory."""
        outer, self._cache = self._cache, {} if self._cache is None else self._cache
        try:
            yield
        finally:
            self._cache = outer

    def _forget(self, key: str) -> None:
        if self._cache is not None:
            self._cache.pop(key, None)

    def _drop(self, key: str) -> None:
        self._forget(key)
        entry = self._entries.pop(key, None)
        if entry is not None and isinstance(entry.source, _Held):
            self._held -= entry.source.tensor.numel() * entry.source.tensor.element_size()


def _split(edits: tuple[Edit, ...]) -> tuple[tuple[Edit, ...], Chain | None]:
    """The recorded edits before the row that composes at their end, and that row."""
    last = edits[-1] if edits else None
    return (edits[:-1], last) if isinstance(last, Chain) else (edits, None)


def _read(key: str, entry: _Entry, edits: Iterable[Edit]) -> Tensor:
    tensor = entry.source.read()
    with _named(key):
        for edit in edits:
            tensor = edit(tensor)
    return tensor


@contextmanager
def _named(key: str) -> Iterator[None]:
    """Errors on the way say which weight they are about."""
    try:
        yield
    except Exception as error:
        error.add_note(f"in weight {key!r}")
        raise


class _Held(MemorySource):
    """A tensor the store itself keeps alive, counted against its budget."""
