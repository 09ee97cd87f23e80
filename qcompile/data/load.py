"""Any source of data as token batches for calibration, or as passages for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from qcompile.data.batches import Batches, Passages
from qcompile.data.documents import TOKEN_FILES, Document, from_iterable, text_documents, token_file
from qcompile.data.generated import generated_tokens
from qcompile.data.hub import KNOWN, hub_documents
from qcompile.data.packing import Bos, bos_token, random_windows, separate, stream, strided
from qcompile.data.tokenizer import Tokenizer, load_tokenizer
from qcompile.errors import QCompileError
from qcompile.ir.program import Program

Source = str | Path | Tensor | Iterable[Any]
"""``"generated"``, a path (text, ``.jsonl``, ``.npy``, ``.safetensors``), a dataset (``wikitext2``, ``c4``, ``pile``,
``pileval``, ``fineweb``, ``cnn_dailymail``, ``owner/name[:config[:split]]``), tokens ``[n, length]`` or ``[tokens]``,
or an iterable of texts, token lists or batches."""

_SURPLUS = 8  # times the tokens needed are read of what has no end
_PORTION = 2 << 20  # bytes of a text file that are enough for calibration: tokenizers take seconds for more


def load_batches(
    source: Source = "generated",
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    batch: int = 8,
    bos: Bos = "none",
    program: Program | None = None,
    field: str | None = None,
    cache_folder: Path | None = None,
) -> Batches:
    """Calibration data: `samples` sequences of `length` tokens, the same for the same arguments.

    Args:
        source: see `Source`. Text is tokenized, joined, and cut in random windows that do not overlap; of a file over
            2 MiB, 2 MiB (or 32 bytes a token that is needed) from a random place are read. Of token rows the first
            `samples` are taken, cut to `length`.
        tokenizer: anything `load_tokenizer` takes; that of `program` if None.
        batch: sequences in a batch.
        bos: where the token that begins a text is put; not for token rows or generated text, which are as they are.
        program: writes the text for ``"generated"``; where given, tokens and length are checked against it.
        field: of a ``.jsonl`` file or a dataset, what holds the text; "text" (or the dataset's own) if None.
        cache_folder: where generated text is kept; the user's folder of caches if None.

    Raises:
        QCompileError: a source that is not there, cannot be read, has too few tokens, or does not fit the program.
    """
    _check_size(samples, length, program)
    if isinstance(source, str) and source == "generated":
        if program is None:
            raise QCompileError("data 'generated' is written by the model: give program=, or a text file, or tokens")
        name = f"written by the model (seed {seed})"
        return Batches(generated_tokens(program, samples, length, seed, cache_folder), batch, name)
    reader = None if tokenizer is None and program is None else _tokenizer(tokenizer, program)
    need = samples * length
    found, name = _open(source, field, seed, evaluation=False, need=need)
    if isinstance(found, Tensor) and found.ndim == 2:
        tokens = _rows(found, samples, length, name)
    else:
        before = bos_token(bos, reader, _model_bos(program))
        if isinstance(found, Tensor):
            text = found.flatten().to(torch.int64)
        else:
            enough = None if isinstance(found, list) else _SURPLUS * need
            text = stream(found, reader, before if bos == "document" else [], enough).ids
        first = before if bos == "sequence" else []
        tokens = random_windows(text, samples, length, seed, first, name)
        name = f"{name} (seed {seed}, bos: {bos})"
    _check_tokens(tokens, program, name)
    return Batches(tokens, batch, name)


def load_passages(
    source: Source,
    tokenizer: Any = None,
    length: int | None = None,
    mode: Literal["strided", "documents"] = "strided",
    stride: int | None = None,
    limit: int | None = None,
    bos: Bos | None = None,
    program: Program | None = None,
    field: str | None = None,
    seed: int = 1,
    cache_folder: Path | None = None,
) -> Passages:
    """Evaluation data, read in order and in full.

    Args:
        source: see `Source`. Of ``"generated"`` there are `limit` sequences (64 if None), written with `seed`: another
            than calibration's, so that a model is not judged by what it was fitted to.
        length: tokens that the model sees at a time; the positions of `program` if None.
        mode: "strided" joins the documents and cuts them every `stride` tokens; "documents" lets the model see each
            document by itself, cut to `length`.
        stride: `length` (less the token in front) if None: windows side by side.
        limit: windows, documents, or rows, at most.
        bos: None puts the token that begins a text in front of every sequence where there is one ("sequence"), else
            nowhere. In the mode "documents", "document" is the same as "sequence".

    Raises:
        QCompileError: as `load_batches`; or there is nothing to predict.
    """
    if mode not in ("strided", "documents"):
        raise QCompileError(f"mode is {mode!r}; give strided or documents")
    length = length or (program.info.get("max_positions") if program is not None else None)
    if length is None:
        raise QCompileError("length is not given and no program says its positions; give length=")
    _check_size(1, length, program)
    if isinstance(source, str) and source == "generated":
        return Passages.of(
            load_batches(source, None, limit or 64, length, seed, program=program, cache_folder=cache_folder)
        )
    reader = None if tokenizer is None and program is None else _tokenizer(tokenizer, program)
    found, name = _open(source, field, 0, evaluation=True, need=None)
    if isinstance(found, Tensor) and found.ndim == 2:
        passages = Passages.of(Batches(found[:limit, :length], source=name))
    else:
        fallback = _model_bos(program)
        if bos is None:
            bos = "none" if (reader is None or reader.bos_token_id is None) and fallback is None else "sequence"
        before = bos_token(bos, reader, fallback)
        documents: Iterable[Document] = [found.tolist()] if isinstance(found, Tensor) else found
        if mode == "documents":
            passages = separate(documents, reader, length, before, limit, name)
        else:
            first = before if bos == "sequence" else []
            # one window more than asked for, or a limit would change what the last one holds
            enough = None if limit is None else (limit + 1) * length
            text = stream(documents, reader, before if bos == "document" else [], enough)
            passages = strided(text, length, stride or length - len(first), first, limit, name)
    for ids in passages.sequences:
        _check_tokens(ids, program, name)
    return passages


def _open(
    source: Source, field: str | None, seed: int, evaluation: bool, need: int | None
) -> tuple[Tensor | Iterable[Document], str]:
    """What the source holds, tokens or documents, and what to call it. A dataset is read as its documents are."""
    if isinstance(source, Tensor):
        return source, "given tokens"
    if isinstance(source, (str, Path)):
        path = _path(source)
        if path is None:
            return _hub(str(source), evaluation, seed, field), str(source)
        if path.suffix in TOKEN_FILES:
            return token_file(path), path.name
        portion = None if need is None else max(_PORTION, 32 * need)
        return text_documents(path, field or "text", portion, seed), path.name
    if hasattr(source, "dtype") and hasattr(source, "shape"):
        return torch.as_tensor(source), "given tokens"
    if not hasattr(source, "__iter__"):
        raise QCompileError(f"data is a {type(source).__name__}; give a path, a dataset's name, tokens or an iterable")
    return from_iterable(source, None if need is None else _SURPLUS * need), "given data"


def _hub(name: str, evaluation: bool, seed: int, field: str | None) -> Iterator[Document]:
    yield from hub_documents(name, evaluation, seed, field)


def _path(source: str | Path) -> Path | None:
    """The file that a source names, or None where it names a dataset. Raises QCompileError for a missing file."""
    path = Path(source).expanduser()
    if path.is_file():
        return path
    if str(source) in KNOWN:
        return None
    if path.is_dir():
        raise QCompileError(f"data {str(source)!r} is a directory; give a file in it")
    named = isinstance(source, Path) or source.startswith((".", "/", "~")) or "\\" in source
    if named or path.suffix in (*TOKEN_FILES, ".txt", ".jsonl", ".ndjson", ".md"):
        raise QCompileError(f"data file {str(source)!r} does not exist; give a path that does, or 'generated'")
    return None


def _rows(rows: Tensor, samples: int, length: int, name: str) -> Tensor:
    if len(rows) < samples or rows.shape[1] < length:
        raise QCompileError(
            f"{name}: {rows.shape[0]} × {rows.shape[1]} tokens are less than {samples} samples of {length}; "
            f"ask for samples={min(samples, len(rows))}, length={min(length, rows.shape[1])}"
        )
    return rows[:samples, :length]


def _tokenizer(tokenizer: Any, program: Program | None) -> Tokenizer | None:
    where = tokenizer if tokenizer is not None or program is None else program.info.get("tokenizer")
    return None if where is None else load_tokenizer(where)


def _model_bos(program: Program | None) -> int | None:
    token = None if program is None else program.info.get("bos_token_id")
    if isinstance(token, (list, tuple)):
        token = token[0] if token else None
    return None if token is None else int(token)


def _check_size(samples: int, length: int, program: Program | None) -> None:
    if samples < 1 or length < 1:
        raise QCompileError(f"{samples} samples of {length} tokens: give at least 1 of each")
    limit = None if program is None else program.info.get("max_positions")
    if limit is not None and length > limit:
        raise QCompileError(f"sequences of {length} tokens exceed the model's {limit} positions; give length={limit}")


def _check_tokens(tokens: Tensor, program: Program | None, name: str) -> None:
    size = None if program is None else program.info.get("vocab_size")
    if size is not None and int(tokens.max()) >= size:
        raise QCompileError(
            f"{name} has token {int(tokens.max())}, the model's vocabulary {size} tokens; use the model's own tokenizer"
        )
