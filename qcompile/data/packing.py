"""Documents made into sequences: random windows or padded documents for calibration, windows in order to evaluate."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from qcompile.data.batches import Passages
from qcompile.data.documents import Document
from qcompile.data.tokenizer import Encoding, Tokenizer
from qcompile.errors import QCompileError
from qcompile.progress import track

Bos = Literal["none", "document", "sequence"]
"""Where the token that begins a text is put: nowhere, before every document, or first in every sequence.

A sequence of `length` tokens includes it.
"""
Packing = Literal["joined", "documents"]
"""How sequences of one length are made: of documents joined and cut anywhere, or of one document each, padded."""


@dataclass(frozen=True)
class Stream:
    """Tokens of documents in a row: `ids` int64 ``[tokens]``, and `widths`, the characters each spells, or None."""

    ids: Tensor
    widths: Tensor | None

    def __len__(self) -> int:
        return len(self.ids)

    def characters(self, begin: int, end: int) -> int | None:
        """How many characters the tokens of a range spell."""
        return None if self.widths is None else int(self.widths[begin:end].sum())


def encode(document: Document, tokenizer: Tokenizer | None) -> Encoding:
    """A document's tokens. Raises QCompileError for text without a tokenizer."""
    if not isinstance(document, str):
        return Encoding(document, None)
    if tokenizer is None:
        raise QCompileError("text needs a tokenizer; give tokenizer= (a directory with a tokenizer.json) or token data")
    return tokenizer.encode(document)


def bos_token(bos: Bos, tokenizer: Tokenizer | None, fallback: int | None = None) -> list[int]:
    """The token to put in front, as a list that is empty where none is. Raises QCompileError where there is none."""
    if bos not in get_args(Bos):
        raise QCompileError(f"bos is {bos!r}; give one of {', '.join(get_args(Bos))}")
    if bos == "none":
        return []
    known = tokenizer.bos_token_id if tokenizer is not None else None
    token = known if known is not None else fallback
    if token is None:
        raise QCompileError(f"bos is {bos!r} and neither tokenizer nor model names such a token; give bos='none'")
    return [token]


def stream(
    documents: Iterable[Document], tokenizer: Tokenizer | None, before: list[int], enough: int | None = None
) -> Stream:
    """The tokens of `documents` in a row, `before` in front of each; left off after `enough` tokens."""
    ids: list[Tensor] = []
    widths: list[Tensor] | None = []
    count = 0
    for document in track(documents, "tokenizing"):
        if not document:
            continue
        encoding = encode(document, tokenizer)
        ids.append(torch.tensor(before + encoding.ids, dtype=torch.int64))
        if widths is not None and encoding.widths is not None:
            widths.append(torch.tensor([0] * len(before) + encoding.widths, dtype=torch.int32))
        else:
            widths = None
        count += len(ids[-1])
        if enough is not None and count >= enough:
            break
    empty = torch.empty(0, dtype=torch.int64)
    return Stream(torch.cat(ids) if ids else empty, torch.cat(widths) if widths else None)


def random_windows(tokens: Tensor, samples: int, length: int, seed: int, before: list[int], source: str) -> Tensor:
    """`samples` windows of a stream, ``[samples, length]``, at random places and in random order; none overlap.

    Each begins with `before`. Raises QCompileError where the stream is too short for that.
    """
    width = length - len(before)
    spare = len(tokens) - samples * width
    if spare < 0:
        fit = len(tokens) // max(1, width)
        way_out = f"ask for at most {fit} samples" if fit else f"ask for sequences of at most {len(tokens)}"
        raise QCompileError(
            f"{source} has {len(tokens):,} tokens; {samples} samples of {length} need {samples * width:,}: "
            f"{way_out}, or give more text"
        )
    generator = torch.Generator().manual_seed(seed)
    # Sorted random gaps, then one window's width more for every window before: uniform among layouts without overlap.
    gaps = torch.randint(spare + 1, (samples,), generator=generator).sort().values
    starts = (gaps + torch.arange(samples) * width)[torch.randperm(samples, generator=generator)]
    windows = tokens[starts[:, None] + torch.arange(width)]
    return torch.cat([torch.tensor(before, dtype=torch.int64).expand(samples, -1), windows], dim=1)


def padded(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None,
    samples: int,
    length: int,
    seed: int,
    before: list[int],
    source: str,
) -> tuple[Tensor, Tensor]:
    """Tokens and mask, ``[samples, length]``: one document a row, `before` in front, cut or padded at the right with 0.

    Of a list, documents are chosen by `seed`; of anything else, the first ones are taken. Empty ones are passed over.
    Raises QCompileError where there are too few.
    """
    if isinstance(documents, list):
        order = torch.randperm(len(documents), generator=torch.Generator().manual_seed(seed)).tolist()
        documents = [documents[i] for i in order]
    tokens, mask = torch.zeros(2, samples, length, dtype=torch.int64)
    count = 0
    for document in track(documents, "tokenizing", samples):
        ids = encode(document, tokenizer).ids if document else []
        if not ids:
            continue
        row = (before + ids)[:length]
        tokens[count, : len(row)] = torch.tensor(row, dtype=torch.int64)
        mask[count, : len(row)] = 1
        count += 1
        if count == samples:
            return tokens, mask
    raise QCompileError(
        f"{source} has {count:,} documents with text; {samples} samples need as many: "
        + (f"ask for at most {count} samples" if count else "give more text")
        + ", or packing='joined', which cuts documents in windows"
    )


def strided(text: Stream, length: int, stride: int, before: list[int], limit: int | None, source: str) -> Passages:
    """Windows of `length` tokens, every `stride` tokens; each scores what no earlier one has scored.

    With ``stride == length`` they stand side by side; with less, every token but the first window's is predicted
    from at least ``length − stride`` tokens before it (the perplexity of fixed-length models as transformers'
    documentation defines it). `before` comes first in each window and is part of its length.
    """
    width = length - len(before)
    if not 1 <= stride <= width:
        raise QCompileError(f"stride is {stride}; give 1 to {width}, the tokens of text in a sequence")
    if len(text) + len(before) < 2:
        raise QCompileError(f"{source} has {len(text)} tokens: nothing to predict; give more text")
    head = torch.tensor(before, dtype=torch.int64)
    sequences: list[Tensor] = []
    starts: list[int] = []
    known: list[int | None] = []
    done = 0
    for begin in range(0, len(text), stride):
        end = min(begin + width, len(text))
        first = max(done, begin + 1 - len(before))  # without a token in front, nothing predicts a window's first one
        if first >= end or (limit is not None and len(sequences) == limit):
            break
        sequences.append(torch.cat([head, text.ids[begin:end]]))
        starts.append(first - begin + len(before))
        known.append(text.characters(first, end))
        done = end
    return Passages(tuple(sequences), tuple(starts), _total(known), source)


def separate(
    documents: Iterable[Document],
    tokenizer: Tokenizer | None,
    length: int,
    before: list[int],
    limit: int | None,
    source: str,
) -> Passages:
    """Each document by itself: `before`, then its first tokens, `length` together; what is longer is cut.

    The first `limit` documents with something to predict.
    """
    sequences: list[Tensor] = []
    known: list[int | None] = []
    for document in track(documents, "tokenizing", limit):
        if limit is not None and len(sequences) == limit:
            break
        encoding = encode(document, tokenizer)
        ids = (before + encoding.ids)[:length]
        if len(ids) < 2:
            continue
        sequences.append(torch.tensor(ids, dtype=torch.int64))
        skipped = 0 if before else 1  # an unpredicted first token spells characters that do not count
        widths = encoding.widths
        known.append(None if widths is None else sum(widths[skipped : len(ids) - len(before)]))
    if not sequences:
        raise QCompileError(f"{source} has no document of two tokens or more: nothing to predict; give more text")
    return Passages(tuple(sequences), (1,) * len(sequences), _total(known), source)


def _total(known: list[int | None]) -> int | None:
    counts = [count for count in known if count is not None]
    return sum(counts) if len(counts) == len(known) else None
