"""What calibration and evaluation read.

`Batches` are token rows of one length, `InputBatches` any program's inputs by name, `Passages` texts of any length. A
pass that runs batches gives ``fill(program, feeds(batch))`` to the program, and leaves out what `token_mask` calls
padding where it can.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from qcompile.errors import QCompileError

Batch = Tensor | Mapping[str, Tensor]
"""Token ids ``[batch, length]`` (int64), or inputs of a program by name."""


@dataclass(frozen=True, eq=False)
class Batches:
    """Token sequences of one length; iterating yields batches, as often as wanted.

    Args:
        tokens: integers ``[samples, length]``.
        batch: sequences in a batch.
        source: where they are from.
        mask: ``[samples, length]``, 1 for a token and 0 for padding, which stands at the right; None where all is
            tokens (a mask of ones is kept as None).

    A batch is ``[up to batch, length]`` (int64), or with a mask ``{"input_ids": …, "attention_mask": …}``, both so.

    >>> data = Batches(torch.arange(10).reshape(5, 2), batch=2, source="a range")
    >>> len(data), [len(b) for b in data]
    (3, [2, 2, 1])
    >>> data.describe()
    '5 × 2 tokens, a range'
    """

    tokens: Tensor
    batch: int = 8
    source: str = "given tokens"
    mask: Tensor | None = None

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
        object.__setattr__(self, "mask", None if self.mask is None else _right_padded(self.mask, tokens.shape))

    def __iter__(self) -> Iterator[Any]:
        """Batches (`Batch`), in order."""
        parts = torch.split(self.tokens, self.batch)
        if self.mask is None:
            return iter(parts)
        masks = torch.split(self.mask, self.batch)
        return ({"input_ids": ids, "attention_mask": mask} for ids, mask in zip(parts, masks, strict=True))

    def __len__(self) -> int:
        return -(-len(self.tokens) // self.batch)

    @property
    def samples(self) -> int:
        """Number of sequences."""
        return self.tokens.shape[0]

    @property
    def length(self) -> int:
        """Tokens in each, padding counted."""
        return self.tokens.shape[1]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of tokens, mask and shape: equal data, equal fingerprint, whatever the batch size."""
        return _digest([self.tokens] if self.mask is None else [self.tokens, self.mask])

    def describe(self) -> str:
        """One line: how much of what."""
        padded = "" if self.mask is None else f" ({int(self.mask.sum()):,} without padding)"
        return f"{self.samples} × {self.length} tokens{padded}, {self.source}"


@dataclass(frozen=True, eq=False)
class InputBatches:
    """Batches of any program's inputs by name, as they were given; what is not named is filled in.

    Args:
        batches: input name → tensor, the first axis of each the samples.
        source: where they are from.

    >>> data = InputBatches(({"pixels": torch.zeros(2, 3, 8, 8)}, {"pixels": torch.ones(1, 3, 8, 8)}))
    >>> data.describe()
    '3 samples of pixels, given inputs'
    """

    batches: tuple[Mapping[str, Tensor], ...]
    source: str = "given inputs"

    def __post_init__(self) -> None:
        if not self.samples:
            raise QCompileError("the calibration data has no samples; give at least one batch")

    def __iter__(self) -> Iterator[Any]:
        """Batches (`Batch`), in order."""
        return iter(self.batches)

    def __len__(self) -> int:
        return len(self.batches)

    @property
    def samples(self) -> int:
        """Number of samples."""
        return sum(samples_of(batch) for batch in self.batches)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of every tensor with its name, dtype and shape, batch by batch."""
        digest = hashlib.sha256()
        for batch in self.batches:
            for name, tensor in sorted(batch.items()):
                digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} ".encode())
                digest.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
        return digest.hexdigest()

    def describe(self) -> str:
        """One line: how much of what."""
        return f"{self.samples} samples of {', '.join(self.batches[0])}, {self.source}"


def feeds(batch: Batch) -> Mapping[str, Tensor]:
    """A batch as inputs by name, for `qcompile.ir.run.fill`."""
    return {"input_ids": batch} if isinstance(batch, Tensor) else batch


def token_mask(batch: Batch) -> Tensor | None:
    """Which of ``[batch, length]`` are tokens and which padding, bool; None where nothing is padding, or no tokens are.

    A mask over more than the tokens (a cache before them) is cut to its last `length` columns.
    """
    given = feeds(batch)
    ids, mask = given.get("input_ids"), given.get("attention_mask")
    if ids is None or mask is None or mask.ndim != 2:
        return None
    chosen = mask[:, -ids.shape[1] :].bool()
    return None if bool(chosen.all()) else chosen


def tokens_in(batch: Batch) -> int:
    """How many tokens a batch has, padding left out; samples, where its inputs are not tokens."""
    ids, mask = feeds(batch).get("input_ids"), token_mask(batch)
    if ids is None:
        return samples_of(batch)
    return ids.numel() if mask is None else int(mask.sum())


def samples_of(batch: Batch) -> int:
    """How many samples a batch has: the length of its first axis."""
    return next((len(tensor) for tensor in feeds(batch).values() if tensor.ndim), 0)


def _right_padded(mask: Tensor, shape: torch.Size) -> Tensor | None:
    """The mask as int64 on the CPU, or None where it is all ones."""
    if mask.shape != shape or mask.is_floating_point():
        raise QCompileError(f"mask is {mask.dtype}{list(mask.shape)}; give integers {list(shape)} as the tokens are")
    found = mask.detach().to("cpu", torch.int64).contiguous()
    if bool(((found != 0) & (found != 1)).any()):
        raise QCompileError(f"mask holds {int(found.min())} to {int(found.max())}; give 1 for tokens, 0 for padding")
    if bool((found.diff(dim=1) > 0).any()) or not bool(found[:, 0].all()):
        row = int(((found.diff(dim=1) > 0).any(1) | (found[:, 0] == 0)).int().argmax())
        raise QCompileError(f"mask row {row} does not begin with tokens and end in padding; pad on the right")
    return None if bool(found.all()) else found


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
        if rows.mask is not None:
            sequences = [ids[mask.bool()] for ids, mask in zip(rows.tokens, rows.mask, strict=True)]
            kept = tuple(ids for ids in sequences if len(ids) > 1)
            return cls(kept, (1,) * len(kept), None, rows.source)
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
