"""Tokenizers: what files say about special tokens, and characters that tokens spell."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors

from qcompile.data import load_tokenizer
from qcompile.errors import QCompileError


def backend() -> Tokenizer:
    """Words of ASCII, one token a byte, and three special tokens; asks for padding and truncation."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<unk>", "<s>", "</s>"]
    vocabulary = {token: index for index, token in enumerate([*special, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.enable_truncation(4)
    tokenizer.enable_padding(length=9)
    return tokenizer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    backend().save(str(tmp_path / "tokenizer.json"))
    return tmp_path


def write(folder: Path, name: str, content: object) -> None:
    (folder / name).write_text(json.dumps(content))


def test_nothing_is_added_or_cut(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    ids = tokenizer.encode("hello world").ids
    assert len(ids) == 11
    assert tokenizer.decode([1, *ids, 2]) == "hello world"
    assert load_tokenizer(folder / "tokenizer.json").encode("hello world").ids == ids
    assert load_tokenizer(tokenizer) is tokenizer


def test_the_bytes_of_a_character_count_once(folder: Path) -> None:
    encoding = load_tokenizer(folder).encode("né€")
    assert len(encoding.ids) == 6
    assert encoding.widths is not None
    assert sum(encoding.widths) == 3


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({}, (None, None)),
        ({"tokenizer_config.json": {"bos_token": "<s>", "eos_token": {"content": "</s>"}}}, (1, 2)),
        ({"special_tokens_map.json": {"bos_token": {"content": "<s>"}}}, (1, None)),
        ({"config.json": {"bos_token_id": 1, "eos_token_id": [2, 0]}}, (1, 2)),
        ({"tokenizer_config.json": {"bos_token": "<absent>"}, "config.json": {"bos_token_id": 5}}, (5, None)),
    ],
)
def test_where_special_tokens_are_named(
    folder: Path, files: dict[str, object], expected: tuple[int | None, int | None]
) -> None:
    for name, content in files.items():
        write(folder, name, content)
    tokenizer = load_tokenizer(folder)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == expected


def test_special_tokens_in_a_text(folder: Path) -> None:
    assert load_tokenizer(folder).encode("<s>").ids == [1]
    write(folder, "tokenizer_config.json", {"split_special_tokens": True})
    assert len(load_tokenizer(folder).encode("<s>").ids) == 3


def test_loaded_tokenizers_serve(folder: Path) -> None:
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), bos_token="<s>", eos_token="</s>")
    bare = Tokenizer.from_file(str(folder / "tokenizer.json"))
    bare.no_truncation()
    bare.no_padding()
    for source in (theirs, bare):
        tokenizer = load_tokenizer(source)
        assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (1, 2)
        assert tokenizer.encode("né") == load_tokenizer(folder).encode("né")
        assert tokenizer.decode([1, *tokenizer.encode("né").ids]) == "né"


def test_what_is_no_tokenizer_is_refused(tmp_path: Path) -> None:
    with pytest.raises(QCompileError, match=r"no tokenizer in .*; give a directory with a tokenizer\.json"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(QCompileError, match="is not a tokenizer of the tokenizers library"):
        load_tokenizer(tmp_path)
    backend().save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(QCompileError, match=r"tokenizer_config\.json is not JSON"):
        load_tokenizer(tmp_path)
    with pytest.raises(QCompileError, match="int is not a tokenizer"):
        load_tokenizer(3)
