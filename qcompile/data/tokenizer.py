"""Text to tokens and back: ``tokenizer.json`` through the tokenizers library, anything else through transformers."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from qcompile.errors import QCompileError


@dataclass(frozen=True)
class Encoding:
    """Tokens of a text, and how many characters each spells (None where the tokenizer cannot tell)."""

    ids: list[int]
    widths: list[int] | None


class Tokenizer(Protocol):
    """What qcompile needs of a tokenizer."""

    @property
    def bos_token_id(self) -> int | None:
        """The token that begins a text; None where the model has none."""
        ...

    @property
    def eos_token_id(self) -> int | None:
        """The token that ends a text; None where the model has none."""
        ...

    def encode(self, text: str) -> Encoding:
        """Tokens of `text` alone: nothing is added in front or behind."""
        ...

    def decode(self, ids: list[int]) -> str:
        """The text that `ids` spell, special tokens left out."""
        ...


@dataclass(frozen=True, eq=False)
class FastTokenizer:
    """A tokenizer of the tokenizers library."""

    backend: Any
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str) -> Encoding:
        encoding = self.backend.encode(text, add_special_tokens=False)
        return Encoding(list(encoding.ids), _widths(encoding.offsets))

    def decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=True))


@dataclass(frozen=True, eq=False)
class TransformersTokenizer:
    """A tokenizer of transformers, for the formats that only it reads."""

    backend: Any

    @property
    def bos_token_id(self) -> int | None:
        return _id(self.backend.bos_token_id)

    @property
    def eos_token_id(self) -> int | None:
        return _id(self.backend.eos_token_id)

    def encode(self, text: str) -> Encoding:
        fast = bool(self.backend.is_fast)
        encoding = self.backend(text, add_special_tokens=False, return_offsets_mapping=fast, verbose=False)
        return Encoding(list(encoding["input_ids"]), _widths(encoding["offset_mapping"]) if fast else None)

    def decode(self, ids: list[int]) -> str:
        return str(self.backend.decode(ids, skip_special_tokens=True))


def load_tokenizer(source: Any) -> Tokenizer:
    """The tokenizer of a model directory, a ``tokenizer.json``, a hub id, or one that is loaded already.

    A directory with a ``tokenizer.json`` needs neither transformers nor a network. Padding and truncation that the
    file asks for are turned off. Raises QCompileError where there is none that can be read.
    """
    if isinstance(source, (FastTokenizer, TransformersTokenizer)):
        return source
    if not isinstance(source, (str, Path)):
        return _wrap(source)
    path = Path(source).expanduser()
    file = path / "tokenizer.json" if path.is_dir() else path
    if file.is_file() and file.suffix == ".json":
        return _from_json(file)
    return _from_transformers(str(path) if path.exists() else str(source))


def _from_json(file: Path) -> FastTokenizer:
    from tokenizers import Tokenizer as Backend

    try:
        backend = Backend.from_file(str(file))
    except Exception as error:  # the library raises plain Exception
        raise QCompileError(f"{file} is not a tokenizer of the tokenizers library: {error}") from error
    backend.no_padding()
    backend.no_truncation()
    settings = _json(file.with_name("tokenizer_config.json"))
    if settings.get("split_special_tokens"):  # "<s>" inside a text is three characters, not a token
        backend.encode_special_tokens = True
    special = {**_json(file.with_name("special_tokens_map.json")), **settings}
    model = _json(file.with_name("config.json"))

    def find(kind: str) -> int | None:
        token = special.get(f"{kind}_token")
        content = token.get("content") if isinstance(token, dict) else token
        found = backend.token_to_id(content) if content else None
        return found if found is not None else _id(model.get(f"{kind}_token_id"))

    return FastTokenizer(backend, find("bos"), find("eos"))


def _from_transformers(name: str) -> TransformersTokenizer:
    from transformers import AutoTokenizer

    try:
        return TransformersTokenizer(AutoTokenizer.from_pretrained(name))
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise QCompileError(
            f"no tokenizer in {name!r} ({_first_line(error)}); give a directory with a tokenizer.json, or token data"
        ) from error


def _wrap(source: Any) -> Tokenizer:
    """An object: ours, transformers', or the tokenizers library's (which does not know its own special tokens)."""
    if hasattr(source, "is_fast"):
        return TransformersTokenizer(source)
    if hasattr(source, "token_to_id"):
        known = [next((i for t in names if (i := source.token_to_id(t)) is not None), None) for names in (_BOS, _EOS)]
        return FastTokenizer(source, *known)
    if all(hasattr(source, name) for name in ("encode", "decode", "bos_token_id", "eos_token_id")):
        tokenizer: Tokenizer = source
        return tokenizer
    raise QCompileError(
        f"{type(source).__name__} is not a tokenizer; give a path, or one of tokenizers or transformers"
    )


_BOS = ("<s>", "<|begin_of_text|>", "<bos>", "<|endoftext|>")
_EOS = ("</s>", "<|end_of_text|>", "<eos>", "<|endoftext|>")


def _widths(offsets: list[tuple[int, int]]) -> list[int]:
    """Characters that each token adds: the bytes of one character, in several tokens, count once."""
    widths, reached = [], 0
    for _, end in offsets:
        widths.append(max(0, end - reached))
        reached = max(reached, end)
    return widths


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise QCompileError(f"{file} is not JSON: {error}") from error
    return content if isinstance(content, dict) else {}


def _id(value: Any) -> int | None:
    """A token id of a configuration, which may be a list of them."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return int(first) if isinstance(first, int) else None


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
