"""Values between two stages, one set for each batch: in memory while they fit a budget, else in files."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor


class ValueStore:
    """Batch number → tensors by name.

    Args:
        budget: bytes that are kept in memory; what comes on top goes to `folder`.
        folder: for files; a temporary one where it is None.
    """

    def __init__(self, budget: int, folder: Path | None = None) -> None:
        self.budget, self.held, self.spilled = budget, 0, 0
        self._memory: dict[int, dict[str, Tensor]] = {}
        self._files: dict[int, Path] = {}
        self._folder = folder
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def put(self, batch: int, values: Mapping[str, Tensor]) -> None:
        """Keep the values of a batch in place of what it had."""
        self._forget(batch)
        size = sum(t.numel() * t.element_size() for t in values.values())
        if not values or self.held + size <= self.budget:
            self._memory[batch] = {name: t.detach() for name, t in values.items()}
            self.held += size
            return
        path = self._place() / f"{id(self)}-{batch}.safetensors"
        own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in values.items()}
        save_file(own, path)  # copies: views of one tensor cannot share a file
        self._files[batch] = path
        self.spilled += size

    def get(self, batch: int) -> dict[str, Tensor]:
        """The values of a batch."""
        if batch in self._memory:
            return self._memory[batch]
        values: dict[str, Tensor] = load_file(self._files[batch])
        return values

    def _forget(self, batch: int) -> None:
        old = self._memory.pop(batch, {})
        self.held -= sum(t.numel() * t.element_size() for t in old.values())
        if path := self._files.pop(batch, None):
            path.unlink()

    def _place(self) -> Path:
        if self._folder is not None:
            return self._folder
        if self._temporary is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="qcompile-")
        return Path(self._temporary.name)
