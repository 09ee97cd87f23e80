"""What is collected while batches stream through: sums over tokens, never the tokens.

    gram:  H = Σ x̂ x̂ᵀ      G = Σ x̂ xᵀ      means of x̂ and x

x̂ is of the program being quantized, x of the float one.

Sums are kept in float64, so that they do not depend on how batches are dealt out; products are in the tensor's dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from qcompile.calibration import integers, sums
from qcompile.calibration.processes import Processes
from qcompile.errors import QCompileError


@dataclass(frozen=True)
class Seen:
    """What one batch brings: values of both programs by name (none of one that is not run), and which tokens count."""

    samples: range  # numbers of the samples in it
    quantized: Mapping[str, Any]
    float: Mapping[str, Any]
    mask: Tensor | None  # bool [batch, length]; None where all count


class Collector(Protocol):
    """Takes in batches."""

    def see(self, seen: Seen) -> None: ...
    def add_up(self, processes: Processes) -> None: ...


class Want(Protocol):
    """A hashable description of what to collect: equal ones share a collector."""

    @property
    def quantized(self) -> tuple[str, ...]:
        """Values of the program being quantized that it looks at."""

    @property
    def float(self) -> tuple[str, ...]:
        """Values of the float program that it looks at."""

    def make(self) -> Collector:
        """A collector that has seen nothing."""


class Gram:
    """H, G and the sums of x̂ and x, all float64, of rows ``[tokens, features]``; None before there are any.

    Until it is settled, H is right up to and in its diagonal blocks only. `in_integers`: see `integers`.
    """

    def __init__(self, in_integers: bool = False) -> None:
        self.in_integers = in_integers
        self.hessian: Tensor | None = None
        self.cross: Tensor | None = None
        self.total: Tensor | None = None
        self.total_float: Tensor | None = None
        self.tokens = 0

    @property
    def width(self) -> int:
        """Features; 0 before there are any."""
        return 0 if self.hessian is None else len(self.hessian)

    def prepare(self, width: int, cross: bool, device: torch.device | None = None) -> None:
        """Zeros for what is not there yet."""
        if self.hessian is None or self.total is None:
            self.hessian = torch.zeros(width, width, dtype=torch.float64, device=device)
            self.total = torch.zeros(width, dtype=torch.float64, device=device)
        if cross and self.cross is None:
            self.cross, self.total_float = torch.zeros_like(self.hessian), torch.zeros_like(self.total)

    def add(self, rows: Tensor, rows_float: Tensor | None) -> None:
        """Take in rows of x̂, and of x where it is wanted."""
        self.prepare(rows.shape[1], rows_float is not None, rows.device)
        assert self.hessian is not None
        assert self.total is not None
        add = integers.add if self.in_integers else sums.add
        add(self.hessian, self.cross, rows, rows_float)
        self.total += sums.column_sums(rows)
        self.tokens += len(rows)
        if rows_float is not None:
            assert self.total_float is not None
            self.total_float += sums.column_sums(rows_float)

    def settle(self, dtype: torch.dtype) -> None:
        """All has been added: fill in the upper half of H, and keep H and G in what rounding computes with, float32
        unless the inputs are float64, which is half the memory.
        """
        work = torch.float64 if dtype == torch.float64 else torch.float32
        if self.hessian is not None:
            self.hessian = self.hessian.to(work)
            sums.mirror(self.hessian)
        if self.cross is not None:
            self.cross = self.cross.to(work)

    def parts(self) -> list[Tensor]:
        """The sums: H and Σ x̂, then G and Σ x where they are wanted."""
        return [t for t in (self.hessian, self.total, self.cross, self.total_float) if t is not None]


def check_finite(rows: Tensor, where: str, samples: range, mask: Tensor | None = None, in_order: bool = True) -> None:
    """QCompileError where a row ``[tokens, features]`` holds nan or infinity, with the place and the sample.

    Args:
        samples: those that the rows are of.
        mask: bool ``[samples, length]``, where padding was left out of the rows.
        in_order: the rows are in the order of the samples; else all of them are named.
    """
    if bool(torch.isfinite(rows.sum())) or bool(torch.isfinite(rows).all()):
        return
    row = int((~torch.isfinite(rows)).any(1).nonzero()[0])
    owners = torch.arange(len(samples)) if mask is None else mask.cpu().nonzero()[:, 0]
    named = f"sample {samples[0]}" if len(samples) == 1 else f"samples {samples[0]}-{samples[-1]}"
    if in_order and len(rows) % len(owners) == 0:
        named = f"sample {samples[int(owners[row * len(owners) // len(rows)])]}"
    raise QCompileError(f"{where} is nan or infinite in calibration {named}; mend the model or the data")
