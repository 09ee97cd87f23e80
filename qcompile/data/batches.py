"""What calibration and evaluation read: token rows of one length (`Batches`) and texts of any length (`Passages`)."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from qcompile.errors import QCompileError


@dataclass(frozen=True, eq=False)
class Batches:
    """Token sequences of one length; iterating yields ``[up to batch, length]`` (int64), as often as wanted.

    >>> data = Batches(torch.arange(10).reshape(5, 2), batch=2, source="a range")
    >>> len(data), [len(b) for b in data]
    (3, [2, 2, 1])
    >>> data.describe()
    '5 × 2 tokens, a range'
    """

    tokens: Tensor
    batch: int = 8
    source: str = "given tokens"

    def __post_init__(self) -> None:
        tokens = self.tokens
        if tokens.ndim != 2 or tokens.numel() == 0 or tokens.is_floating_point() or tokens.dtype == torch.bool:
            raise QCompileError(
                f"tokens are {tokens.dtype}{list(tokens.shape)}; give integers of shape [samples, length], none empty"
            )
        if int(tokens.min()) < 0:
            raise QCompileError(f"token {int(tokens.min())} is negative; token ids start at 0")
        if self.batch < 1:
            raise QCompileError(f"batch is {self.batch}; give 1 or more")
        object.__setattr__(self, "tokens", tokens.detach().to("cpu", torch.int64).contiguous())

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.split(self.tokens, self.batch))

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch)

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each."""
        return self.tokens.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and their shape: equal data, equal fingerprint, whatever the batch size."""
        return _digest([self.tokens])

    def describe(self) -> str:
        """One line: how much of what."""
        return f"{self.samples} × {self.length} tokens, {self.source}"


@dataclass(frozen=True, eq=False)
class Passages:
    """Texts to be scored, each seen by the model on its own.

    Args:
        sequences: int64 ``[length]`` each, at least two tokens.
        scored_from: for each, the index of the first token whose prediction counts; at least 1, as nothing predicts the
            first. More where a text was cut in windows that overlap, so that every token counts once.
        characters: how many characters the scored tokens spell; None where that is not known.
        source: where the texts are from.
    """

    sequences: tuple[Tensor, ...]
    scored_from: tuple[int, ...]
    characters: int | None = None
    source: str = "given tokens"

    def __post_init__(self) -> None:
        if not self.sequences or len(self.sequences) != len(self.scored_from):
            raise QCompileError(f"{len(self.sequences)} sequences, {len(self.scored_from)} starts; give one a sequence")
        for ids, first in zip(self.sequences, self.scored_from, strict=True):
            if ids.ndim != 1 or ids.dtype != torch.int64 or not 1 <= first < len(ids):
                raise QCompileError(
                    f"a passage of {ids.dtype}{list(ids.shape)} scored from token {first}: it must be int64 [length] "
                    "and be scored from 1 or later, before its end"
                )

    @classmethod
    def of(cls, data: Batches | Passages | Tensor) -> Passages:
        """Any token data as passages; rows are scored from their second token."""
        if isinstance(data, Passages):
            return data
        rows = data if isinstance(data, Batches) else Batches(data)
        if rows.length < 2:
            raise QCompileError("sequences of 1 token have nothing to predict; give 2 tokens or more")
        return cls(tuple(rows.tokens), (1,) * rows.samples, None, rows.source)

    @property
    def scored(self) -> int:
        """How many tokens are scored."""
        return sum(len(ids) - first for ids, first in zip(self.sequences, self.scored_from, strict=True))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the tokens and of which are scored."""
        return _digest([*self.sequences, torch.tensor(self.scored_from)])

    def describe(self) -> str:
        """One line: how much of what."""
        return f"{len(self.sequences)} sequences, {self.scored} scored tokens, {self.source}"


def _digest(tensors: list[Tensor]) -> str:
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(repr(tuple(tensor.shape)).encode())
        digest.update(tensor.numpy().astype("<i8").tobytes())
    return digest.hexdigest()
