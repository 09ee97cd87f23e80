"""Writing a store to safetensors files and reading it back, one tensor, or a piece of one, in memory at a time."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.capture.files import DTYPES, read_header
from qcompile.errors import CaptureError
from qcompile.ir.edits import large_buffers_kept
from qcompile.ir.weights import TensorSource, WeightStore

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_BYTES = "U8"  # what an element type that safetensors lacks is stored as


@dataclass(frozen=True)
class _BytesSource:
    """A weight whose elements are stored as bytes."""

    source: TensorSource
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self.source.read().view(self.dtype).reshape(self.shape)


def write_store(store: WeightStore, keys: Sequence[str], directory: Path, limit: int) -> dict[str, Any]:
    """Write the weights `keys`, edits applied, to files of at most `limit` bytes (a larger weight gets its own).

    Returns plain data that `read_store` takes: shape and dtype by key, and the number of files.
    """
    shards = list(_split(store, keys, limit))
    for number, shard in enumerate(shards, 1):
        _write(store, shard, directory / _file_name(number, len(shards)))
    metas = {key: store.meta(key) for key in keys}
    return {
        "files": len(shards),
        "tensors": {k: [str(dtype).removeprefix("torch."), list(shape)] for k, (shape, dtype) in metas.items()},
    }


def read_store(directory: Path, table: Mapping[str, Any]) -> WeightStore:
    """A store over the files that `write_store` wrote; nothing but headers is read.

    Raises CaptureError for a file or tensor that is missing or truncated.
    """
    found: dict[str, TensorSource] = {}
    for number in range(1, table["files"] + 1):
        path = directory / _file_name(number, table["files"])
        if not path.is_file():
            raise CaptureError(f"{directory} lacks {path.name}; save the program again")
        found |= read_header(path)
    store = WeightStore()
    for key, (name, shape) in table["tensors"].items():
        if key not in found:
            raise CaptureError(f"{directory} lacks weight {key!r}; save the program again")
        dtype = getattr(torch, name)
        store.bind(key, found[key] if dtype in _NAMES else _BytesSource(found[key], tuple(shape), dtype))
    return store


def _file_name(number: int, count: int) -> str:
    return f"weights-{number:05}-of-{count:05}.safetensors"


def _split(store: WeightStore, keys: Sequence[str], limit: int) -> Iterator[list[str]]:
    """Keys file by file."""
    shard: list[str] = []
    size = 0
    for key in keys:
        if shard and size + store.nbytes(key) > limit:
            yield shard
            shard, size = [], 0
        shard.append(key)
        size += store.nbytes(key)
    if shard:
        yield shard


def _write(store: WeightStore, keys: list[str], path: Path) -> None:
    """A safetensors file: a header from what the store knows without reading, then one tensor after the other."""
    keys = sorted(keys, key=lambda k: -store.meta(k)[1].itemsize)  # wide elements first keeps every tensor aligned
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for key in keys:
        shape, dtype = store.meta(key)
        size = math.prod(shape) * dtype.itemsize
        known = dtype in _NAMES
        header[key] = {
            "dtype": _NAMES[dtype] if known else _BYTES,
            "shape": list(shape) if known else [size],
            "data_offsets": [offset, offset + size],
        }
        offset += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # data starts aligned, as the format asks
    with path.open("wb") as file, large_buffers_kept():
        file.write(struct.pack("<Q", len(text)) + text)
        for key in keys:
            for piece in store.pieces(key):
                file.write(piece.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
