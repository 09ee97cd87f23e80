"""Documents (text or token lists), token rows and inputs by name, out of files and Python iterables."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.data.batches import samples_of
from qcompile.errors import QCompileError

Document = str | list[int]
Inputs = dict[str, Tensor]
"""Inputs of a program by name, the first axis the samples."""

TOKEN_FILES = (".safetensors", ".npy")


@dataclass(frozen=True, eq=False)
class Rows:
    """Token rows ``[n, length]``, and for each place whether it is a token (1) or padding (0); None: all are tokens.

    Tokens of one axis are one text.
    """

    tokens: Tensor
    mask: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Named:
    """Batches of inputs by name."""

    batches: list[Inputs]


def text_documents(path: Path, field: str, portion: int | None = None, seed: int = 0) -> list[str]:
    """The documents of a text file (one) or of a ``.jsonl`` file (one a line, under `field`).

    Args:
        portion: of a file with more bytes than this, read only that many, from a place chosen by `seed`.

    Raises:
        QCompileError: the file is not UTF-8, or a line is not JSON or lacks the field.
    """
    text = _read(path, portion, seed)
    if path.suffix not in (".jsonl", ".ndjson"):
        return [text] if text else []
    documents = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise QCompileError(f"{path}, line {number} is not JSON: {error}") from error
        found = entry.get(field) if isinstance(entry, dict) else None
        if not isinstance(found, str):
            has = ", ".join(map(repr, entry)) if isinstance(entry, dict) else f"a {type(entry).__name__}"
            raise QCompileError(f"{path}, line {number} has no text under {field!r}; it has {has}: give field=")
        documents.append(found)
    return documents


def _read(path: Path, portion: int | None, seed: int) -> str:
    size = path.stat().st_size
    with path.open("rb") as file:
        if portion is None or size <= portion:
            try:
                return file.read().decode("utf-8")
            except UnicodeDecodeError as error:
                raise QCompileError(
                    f"{path} is not UTF-8 text (byte {error.start}); convert it, or give tokens"
                ) from error
        start = random.Random(seed).randrange(size - portion)
        file.seek(start)
        if not file.readline(1 << 20).endswith(b"\n"):  # not a file of lines: begin in the middle of one
            file.seek(start)
        data = file.read(portion)
    return data[: data.rfind(b"\n") + 1 or len(data)].decode("utf-8", errors="ignore")


def token_file(path: Path) -> Rows:
    """Tokens ``[samples, length]`` or ``[tokens]`` of a ``.npy`` file or of a ``.safetensors`` file with one tensor.

    The second may have the mask of padded rows beside it, under ``attention_mask``. Nothing in either file is executed.

    Raises QCompileError for a file that cannot be read as that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".npy":
            return Rows(_numbers(np.load(path, allow_pickle=False), str(path)))
        tensors: dict[str, Tensor] = load_file(path)
    except (ValueError, OSError, EOFError, SafetensorError) as error:
        raise QCompileError(f"{path} does not read as tokens: {error}") from error
    mask = tensors.pop("attention_mask", None)
    if len(tensors) > 1 and "tokens" not in tensors and "input_ids" not in tensors:
        raise QCompileError(f"{path} holds {sorted(tensors)}; name the one with the tokens 'tokens'")
    name = next((n for n in ("tokens", "input_ids") if n in tensors), next(iter(tensors), None))
    if name is None:
        raise QCompileError(f"{path} holds no tensor; store the tokens under 'tokens'")
    return Rows(tensors[name], mask)


def from_iterable(
    source: Iterable[Any], field: str, samples: int | None, enough: int | None
) -> list[Document] | Rows | Named:
    """What an iterable gives: texts, token lists, batches ``[batch, length]``, or inputs of a program by name.

    An item may be a mapping: with a text under `field`; with one list of ``input_ids`` (where an ``attention_mask`` is
    0, left out); with a batch of them. Any other mapping is inputs by name. An iterable without a length is left off
    once it has given `enough` tokens (a text counts as its characters), or inputs of `samples` samples.
    """
    documents: list[Document] = []
    rows: list[Rows] = []
    inputs: list[Inputs] = []
    tokens = 0
    for item in source:
        value = _mapped(dict(item), field) if hasattr(item, "keys") else item
        if isinstance(value, str):
            documents.append(value)
            tokens += len(value) // 8  # a text has more tokens than that in any tokenizer
        elif isinstance(value, dict):
            inputs.append(value)
        else:
            found = value if isinstance(value, Rows) else Rows(_integers(value, "an item of the data"))
            rows += [found] if found.tokens.ndim == 2 else []
            documents += [] if found.tokens.ndim == 2 else [found.tokens.flatten().tolist()]
            tokens += found.tokens.numel()
        if sum(map(bool, (documents, rows, inputs))) > 1:
            raise QCompileError(
                "the data mixes batches [batch, length], texts or token lists, and inputs by name; give one kind"
            )
        full = enough is not None and tokens >= enough
        full |= samples is not None and sum(map(samples_of, inputs)) >= samples
        if full and not hasattr(source, "__len__"):
            break
    return Named(inputs) if inputs else _joined(rows) if rows else documents


def _mapped(item: dict[str, Any], field: str) -> str | Rows | Inputs:
    """What an item says by name; `Rows` of one axis are the tokens of a document."""
    if isinstance(item.get(field), str):
        return str(item[field])
    if "input_ids" not in item and not any(hasattr(value, "shape") for value in item.values()):
        raise QCompileError(f"an item of the data has no text under {field!r}; it has {list(item)}: give field=")
    if "input_ids" in item:
        ids, mask = _integers(item["input_ids"], "input_ids"), item.get("attention_mask")
        mask = None if mask is None else _integers(mask, "attention_mask")
        if mask is not None and mask.shape != ids.shape:
            raise QCompileError(f"attention_mask is {list(mask.shape)}, input_ids {list(ids.shape)}; make them alike")
        if ids.ndim == 1:
            return Rows(ids if mask is None else ids[mask.bool()])
        if set(item) <= {"input_ids", "attention_mask"}:
            return Rows(ids, mask)
    return {key: _tensor(value, key) for key, value in item.items()}


def _joined(rows: list[Rows]) -> Rows:
    """Rows of all batches; where they have masks, shorter ones are padded at the right."""
    lengths = sorted({row.tokens.shape[1] for row in rows})
    if len(lengths) > 1 and any(row.mask is None for row in rows):
        raise QCompileError(f"the batches have lengths {lengths}; make them one length, or give an attention_mask")
    tokens = torch.cat([_widened(row.tokens, lengths[-1]) for row in rows])
    if all(row.mask is None for row in rows):
        return Rows(tokens)
    masks = [torch.ones_like(row.tokens) if row.mask is None else row.mask for row in rows]
    return Rows(tokens, torch.cat([_widened(mask.to(torch.int64), lengths[-1]) for mask in masks]))


def _widened(rows: Tensor, length: int) -> Tensor:
    return torch.nn.functional.pad(rows, (0, length - rows.shape[1]))


def _tensor(value: Any, name: str) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach().cpu()
    try:
        return torch.from_numpy(np.asarray(value))
    except (TypeError, ValueError) as error:
        raise QCompileError(f"{name!r} of the data is a {type(value).__name__}; give tensors or arrays") from error


def _integers(value: Any, where: str) -> Tensor:
    return value.detach().cpu() if isinstance(value, Tensor) else _numbers(value, where)


def _numbers(value: Any, where: str) -> Tensor:
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise QCompileError(f"{where} is ragged: {error}") from error
    if array.dtype.kind not in "iu" or array.ndim not in (1, 2):
        raise QCompileError(
            f"{where} is {array.dtype}{list(array.shape)}; give text, or integers [tokens] or [n, tokens]"
        )
    return torch.from_numpy(array.astype(np.int64))
