"""Statistics of what products read, collected while calibration batches stream through the program.

What is kept is vectors, or a number of rows, for each tensor that is watched; never a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, fx

from qcompile.data.batches import Batch, feeds, token_mask, tokens_in
from qcompile.data.padding import Padding
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.pass_base import Report
from qcompile.progress import track

Watched = tuple[fx.Node, int]
"""A tensor and its axis of channels."""


class Collector(Protocol):
    """Keeps what it needs of rows ``[rows, channels]``."""

    def see(self, rows: Tensor) -> None: ...


class Peaks:
    """max |x| of each channel, float64 ``[channels]``."""

    def __init__(self) -> None:
        self.value = torch.zeros(0, dtype=torch.float64)

    def see(self, rows: Tensor) -> None:
        """Take in more rows."""
        peak = rows.abs().amax(0).double() if len(rows) else torch.zeros(rows.shape[1], dtype=torch.float64)
        self.value = torch.maximum(self.value, peak) if self.value.numel() else peak


class Sample:
    """mean |x| of each channel, and up to `limit` rows chosen evenly among all that are seen, with a seed."""

    def __init__(self, limit: int, seed: int) -> None:
        self._limit, self._count = limit, 0
        self._random = torch.Generator().manual_seed(seed)
        self._sum: Tensor | None = None
        self._rows: Tensor | None = None
        self._draws = torch.empty(0, dtype=torch.float64)

    @property
    def mean(self) -> Tensor:
        """mean |x|, float64 ``[channels]``."""
        return torch.empty(0, dtype=torch.float64) if self._sum is None else self._sum / max(1, self._count)

    @property
    def rows(self) -> Tensor:
        """The rows that were chosen, in the dtype of the tensor."""
        return torch.empty(0, 0) if self._rows is None else self._rows

    def see(self, rows: Tensor) -> None:
        """Take in more rows: each draws a number, and the `limit` smallest numbers stay."""
        total = rows.abs().sum(0, dtype=torch.float64)
        self._sum = total if self._sum is None else self._sum + total
        self._count += len(rows)
        draws = torch.rand(len(rows), generator=self._random, dtype=torch.float64)
        if self._rows is not None:
            draws, rows = torch.cat([self._draws, draws]), torch.cat([self._rows, rows])
        kept = draws.argsort()[: self._limit]
        self._draws, self._rows = draws[kept], rows[kept].clone()


def watch(
    program: Program, watched: Mapping[Watched, Collector], batches: Iterable[Batch], report: Report | None = None
) -> int:
    """Run batches and show each collector its tensor, rows by channels; the number of tokens seen (else of samples).

    Rows of padding are left out; `report` is told where they could not be.

    Raises QCompileError for data without tokens, and for a nan or infinity with the place and the batch.
    """
    places: dict[fx.Node, list[tuple[int, Collector]]] = {}
    for (node, axis), collector in watched.items():
        places.setdefault(node, []).append((axis, collector))
    tokens, padding = 0, Padding(program)
    for index, batch in enumerate(track(batches, "watching activations")):
        kept = token_mask(batch)

        def observe(node: fx.Node, value: Any, index: int = index, mask: Tensor | None = kept) -> None:
            for axis, collector in places.get(node, ()):
                if not bool(value.isfinite().all()):
                    where = f"{program.module_of(node)} ({node.name})"
                    raise QCompileError(f"{where} is nan or infinite in calibration batch {index}; mend the model")
                collector.see(padding.tokens_of(node, value, mask).movedim(axis, -1).flatten(0, -2))

        run(program, fill(program, feeds(batch)), observe)
        tokens += tokens_in(batch)
    if report is not None:
        report.notes += padding.notes()
    if not tokens:
        raise QCompileError("the calibration data has no tokens; give data= with at least one batch")
    return tokens
