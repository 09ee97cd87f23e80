"""Documents (text or token lists) out of files and Python iterables."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qcompile.errors import QCompileError

Document = str | list[int]

TOKEN_FILES = (".safetensors", ".npy")


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


def token_file(path: Path) -> Tensor:
    """Tokens ``[samples, length]`` or ``[tokens]`` of a ``.npy`` file or of a ``.safetensors`` file with one tensor.

    Nothing in either file is executed. Raises QCompileError for a file that cannot be read as that.
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        if path.suffix == ".npy":
            return _numbers(np.load(path, allow_pickle=False), str(path))
        tensors: dict[str, Tensor] = load_file(path)
    except (ValueError, OSError, EOFError, SafetensorError) as error:
        raise QCompileError(f"{path} does not read as tokens: {error}") from error
    if len(tensors) > 1 and "tokens" not in tensors and "input_ids" not in tensors:
        raise QCompileError(f"{path} holds {sorted(tensors)}; name the one with the tokens 'tokens'")
    name = next((n for n in ("tokens", "input_ids") if n in tensors), next(iter(tensors), None))
    if name is None:
        raise QCompileError(f"{path} holds no tensor; store the tokens under 'tokens'")
    return tensors[name]


def from_iterable(source: Iterable[Any], enough: int | None) -> list[Document] | Tensor:
    """What an iterable gives: texts, token lists, or batches ``[batch, length]``, which are joined.

    An item may also be a mapping with ``input_ids``. An iterable without a length is left off once it has given
    `enough` tokens (a text counts as its characters).
    """
    documents: list[Document] = []
    rows: list[Tensor] = []
    count = 0
    for item in source:
        value = item["input_ids"] if hasattr(item, "keys") and "input_ids" in item else item
        if isinstance(value, str):
            documents.append(value)
            count += len(value) // 8  # a text has more tokens than that in any tokenizer
        else:
            tokens = value if isinstance(value, Tensor) else _numbers(value, "an item of the data")
            rows += [tokens] if tokens.ndim == 2 else []
            documents += [] if tokens.ndim == 2 else [tokens.flatten().tolist()]
            count += tokens.numel()
        if rows and documents:
            raise QCompileError("the data mixes batches [batch, length] with texts or token lists; give one kind")
        if enough is not None and count >= enough and not hasattr(source, "__len__"):
            break
    if len({row.shape[1] for row in rows}) > 1:
        raise QCompileError(f"the batches have lengths {sorted({row.shape[1] for row in rows})}; make them one length")
    return torch.cat(rows) if rows else documents


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
