"""Any source of data as token batches for calibration, or as passages for evaluation."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from qcompile.data.batches import Batches, InputBatches, Passages, feeds, samples_of
from qcompile.data.documents import (
    TOKEN_FILES,
    Document,
    Inputs,
    Named,
    Rows,
    from_iterable,
    text_documents,
    token_file,
)
from qcompile.data.generated import generated_tokens
from qcompile.data.hub import KNOWN, hub_documents
from qcompile.data.packing import Bos, Packing, bos_token, padded, random_windows, separate, stream, strided
from qcompile.data.tokenizer import Tokenizer, load_tokenizer
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import signature
from qcompile.ir.types import SHORT

Source = str | Path | Tensor | Iterable[Any]
"""``"generated"``, a path (text, ``.jsonl``, ``.npy``, ``.safetensors``), a dataset (``wikitext2``, ``c4``, ``pile``,
``pileval``, ``fineweb``, ``cnn_dailymail``, ``owner/name[:config[:split]]``), tokens ``[n, length]`` or ``[tokens]``,
or an iterable of texts, token lists or batches."""

_SURPLUS = 8  # times the tokens needed are read of what has no end
_PORTION = 2 << 20  # bytes of a text file that are enough for calibration: tokenizers take seconds for more
_BYTES = {"joined": 32, "documents": 256}  # or so many for a token that is needed; of a document only the first count


def load_batches(
    source: Source = "generated",
    tokenizer: Any = None,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    batch: int = 8,
    bos: Bos = "none",
    packing: Packing = "joined",
    program: Program | None = None,
    field: str | None = None,
    cache_folder: Path | None = None,
) -> Batches:
    """Calibration data: `samples` sequences of `length` tokens, the same for the same arguments.

    Args:
        source: see `Source`. Of a file over 2 MiB, 2 MiB (or 32 bytes a token that is needed, 256 for documents) from a
            random place are read. Of token rows the first `samples` are taken, cut to `length`.
        tokenizer: anything `load_tokenizer` takes; that of `program` if None.
        batch: sequences in a batch.
        bos: where the token that begins a text is put; not for token rows or generated text, which are as they are.
        packing: "joined" cuts the text of all documents in random windows that do not overlap; "documents" takes one
            document a sequence, cut to `length` or padded at the right, with a mask. Not for token rows or generated
            text.
        program: writes the text for ``"generated"``; where given, tokens and length are checked against it.
        field: of a ``.jsonl`` file, a dataset or mappings, what holds the text; "text" (or the dataset's own) if None.
        cache_folder: where generated text is kept; the user's folder of caches if None.

    Raises:
        QCompileError: a source that is not there, cannot be read, has too few tokens, or does not fit the program.
    """
    how = _How(samples, length, seed, batch, bos, packing, field)
    found = _load(source, tokenizer, how, program, cache_folder)
    if isinstance(found, InputBatches):
        raise QCompileError(
            f"the data has inputs {list(found.batches[0])}; give token rows (input_ids and attention_mask), or let "
            "load_inputs read it"
        )
    return found


def load_inputs(
    source: Source,
    program: Program,
    samples: int = 128,
    length: int = 512,
    seed: int = 0,
    batch: int = 8,
    bos: Bos = "none",
    packing: Packing = "joined",
    field: str | None = None,
    cache_folder: Path | None = None,
) -> Batches | InputBatches:
    """Calibration data for any program: as `load_batches`, and from an iterable of mappings of its inputs too.

    Mappings of other inputs than ``input_ids`` and ``attention_mask`` are taken batch by batch as they are, until there
    are `samples` samples; names, dtypes and fixed sizes must be the program's.

    Raises:
        QCompileError: as `load_batches`; or the program has other inputs than the data.
    """
    return _load(source, None, _How(samples, length, seed, batch, bos, packing, field), program, cache_folder)


@dataclass(frozen=True)
class _How:
    """Options of `load_batches`."""

    samples: int
    length: int
    seed: int
    batch: int
    bos: Bos
    packing: Packing
    field: str | None


def _load(
    source: Source, tokenizer: Any, how: _How, program: Program | None, cache_folder: Path | None
) -> Batches | InputBatches:
    _check_size(how.samples, how.length, program)
    if how.packing not in get_args(Packing):
        raise QCompileError(f"packing is {how.packing!r}; give one of {', '.join(get_args(Packing))}")
    if isinstance(source, str) and source == "generated":
        if program is None:
            raise QCompileError("data 'generated' is written by the model: give program=, or a text file, or tokens")
        name = f"written by the model (seed {how.seed})"
        return Batches(generated_tokens(program, how.samples, how.length, how.seed, cache_folder), how.batch, name)
    reader = None if tokenizer is None and program is None else _tokenizer(tokenizer, program)
    found, name = _open(source, how, evaluation=False)
    if isinstance(found, Named):
        return _inputs(found.batches, how.samples, program, name)
    if isinstance(found, Rows) and found.tokens.ndim == 2:
        asked = how.bos != "none" or how.packing != "joined"
        data = _rows(found, how, f"{name} (rows as they are)" if asked else name)
    else:
        data = _packed(found, reader, how, bos_token(how.bos, reader, _model_bos(program)), name)
    _check_tokens(data.tokens, program, data.source)
    if program is not None:
        check_inputs(program, feeds(next(iter(data))), data.source)
    return data


def _packed(
    found: Rows | Iterable[Document], reader: Tokenizer | None, how: _How, before: list[int], name: str
) -> Batches:
    """Sequences of one length out of documents."""
    said = f"{name} (seed {how.seed}, bos: {how.bos}{', documents' if how.packing == 'documents' else ''})"
    documents = [found.tokens.flatten().tolist()] if isinstance(found, Rows) else found
    if how.packing == "documents":
        tokens, mask = padded(documents, reader, how.samples, how.length, how.seed, before, name)
        return Batches(tokens, how.batch, said, mask)
    enough = None if isinstance(documents, list) else _SURPLUS * how.samples * how.length
    text = stream(documents, reader, before if how.bos == "document" else [], enough).ids
    first = before if how.bos == "sequence" else []
    return Batches(random_windows(text, how.samples, how.length, how.seed, first, name), how.batch, said)


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
    found, name = _open(source, _How(0, 0, 0, 1, "none", "joined", field), evaluation=True)
    if isinstance(found, Named):
        raise QCompileError(
            f"the data has inputs {list(found.batches[0])}; only token rows and texts can be evaluated on"
        )
    if isinstance(found, Rows) and found.tokens.ndim == 2:
        mask = None if found.mask is None else found.mask[:limit, :length]
        passages = Passages.of(Batches(found.tokens[:limit, :length], source=name, mask=mask))
    else:
        documents: Iterable[Document] = [found.tokens.tolist()] if isinstance(found, Rows) else found
        passages = _read(documents, reader, length, mode == "documents", stride, limit, bos, _model_bos(program), name)
    for ids in passages.sequences:
        _check_tokens(ids, program, name)
    return passages


def _read(
    documents: Iterable[Document],
    reader: Tokenizer | None,
    length: int,
    apart: bool,
    stride: int | None,
    limit: int | None,
    bos: Bos | None,
    fallback: int | None,
    name: str,
) -> Passages:
    """Passages of documents, each `apart` from the others or all joined."""
    if bos is None:
        bos = "none" if (reader is None or reader.bos_token_id is None) and fallback is None else "sequence"
    before = bos_token(bos, reader, fallback)
    if apart:
        return separate(documents, reader, length, before, limit, name)
    first = before if bos == "sequence" else []
    # one window more than asked for, or a limit would change what the last one holds
    enough = None if limit is None else (limit + 1) * length
    text = stream(documents, reader, before if bos == "document" else [], enough)
    return strided(text, length, stride or length - len(first), first, limit, name)


def _open(source: Source, how: _How, evaluation: bool) -> tuple[Rows | Named | Iterable[Document], str]:
    """What the source holds, all of it for evaluation, and what to call it. A dataset is read as its documents are."""
    if isinstance(source, (str, Path)):
        path = _path(source)
        if path is None:
            return _hub(str(source), evaluation, how.seed, how.field), str(source)
        if path.suffix in TOKEN_FILES:
            return token_file(path), path.name
        each = _BYTES[how.packing] * how.samples * how.length
        portion = None if evaluation else max(_PORTION, each)
        return text_documents(path, how.field or "text", portion, how.seed), path.name
    if hasattr(source, "dtype") and hasattr(source, "shape"):
        return Rows(torch.as_tensor(source)), "given tokens"
    if not hasattr(source, "__iter__") or hasattr(source, "keys"):
        raise QCompileError(f"data is a {type(source).__name__}; give a path, a dataset's name, tokens or an iterable")
    enough = None if evaluation else _SURPLUS * how.samples * how.length
    return from_iterable(source, how.field or "text", None if evaluation else how.samples, enough), "given data"


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


def _rows(rows: Rows, how: _How, name: str) -> Batches:
    count, width = rows.tokens.shape
    if count < how.samples or width < how.length:
        raise QCompileError(
            f"{name}: {count} × {width} tokens are less than {how.samples} samples of {how.length}; "
            f"ask for samples={min(how.samples, count)}, length={min(how.length, width)}"
        )
    part = (slice(how.samples), slice(how.length))
    return Batches(rows.tokens[part], how.batch, name, None if rows.mask is None else rows.mask[part])


def _inputs(batches: list[Inputs], samples: int, program: Program | None, name: str) -> InputBatches:
    """Whole batches until there are `samples` samples."""
    taken: list[Inputs] = []
    count = 0
    for batch in batches:
        if count >= samples:
            break
        if program is not None:
            check_inputs(program, batch, f"{name}, batch {len(taken)}")
            if "input_ids" in batch:
                _check_tokens(batch["input_ids"], program, name)
                _check_size(1, batch["input_ids"].shape[-1], program)
        taken.append(batch)
        count += samples_of(batch)
    if count < samples:
        raise QCompileError(f"{name}: {count} samples are less than {samples}; ask for samples={count}")
    return InputBatches(tuple(taken), name)


def check_inputs(program: Program, given: Mapping[str, Tensor], where: str) -> None:
    """Raise QCompileError unless a batch has the program's inputs, of their dtypes and fixed sizes.

    What `qcompile.ir.run.fill` fills in beside ``input_ids`` may be left out.
    """
    declared = {node.name: node for node in program.inputs}
    if unknown := [name for name in given if name not in declared]:
        way_out = "give packing='joined', or rows without padding" if unknown == ["attention_mask"] else "leave it out"
        raise QCompileError(f"{where} has {unknown[0]!r}, the program takes {list(declared)}: {way_out}")
    if missing := [name for name in declared if name not in given and not ("input_ids" in given and _filled(name))]:
        raise QCompileError(
            f"{where} has no {missing[0]!r}, which the program takes: give data= with mappings of {list(declared)}"
        )
    types = signature(program)
    for name, tensor in given.items():
        kind, shape = types[name], tuple(tensor.shape)
        fits = len(shape) == len(kind.sizes) and all(w in (None, h) for w, h in zip(kind.sizes, shape, strict=True))
        if tensor.dtype != kind.dtype or not fits:
            raise QCompileError(
                f"{where} has {name!r} of {SHORT.get(tensor.dtype, tensor.dtype)}{list(shape)}; "
                f"the program takes {program.type_of(declared[name])}"
            )


def _filled(name: str) -> bool:
    return name in ("attention_mask", "position_ids") or name.startswith("past_key_values_")


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
