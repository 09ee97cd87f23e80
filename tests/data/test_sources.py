"""Every kind of source, and what each refuses."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from qcompile.data import Batches, Passages, load_batches, load_passages
from qcompile.data.documents import text_documents
from qcompile.data.tokenizer import Encoding
from qcompile.errors import QCompileError
from qcompile.ir.program import Program


@dataclass(frozen=True)
class Letters:
    """One token a character, its code point; token 1 begins a text."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = None

    def encode(self, text: str) -> Encoding:
        return Encoding([ord(c) for c in text], [1] * len(text))

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def spelled(data: Batches) -> list[str]:
    return [Letters().decode(row) for row in data.tokens.tolist()]


ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@pytest.mark.parametrize("bos", ["none", "document", "sequence"])
def test_windows_of_text(tmp_path: Path, bos: Any) -> None:
    path = tmp_path / "a.txt"
    path.write_text(ALPHABET * 4)
    data = load_batches(path, Letters(), samples=10, length=6, seed=0, batch=4, bos=bos)
    again = load_batches(str(path), Letters(), samples=10, length=6, seed=0, batch=3, bos=bos)
    assert data.fingerprint == again.fingerprint
    assert data.fingerprint != load_batches(path, Letters(), samples=10, length=6, seed=1, bos=bos).fingerprint
    assert [tuple(b.shape) for b in data] == [(4, 6), (4, 6), (2, 6)]
    assert [torch.equal(a, b) for a, b in zip(data, data, strict=True)] == [True] * 3
    for row in spelled(data):
        if bos == "sequence":
            assert row[0] == "\x01"
        assert row.lstrip("\x01") in "\x01" * (bos == "document") + ALPHABET * 4
    assert data.describe() == f"10 × 6 tokens, a.txt (seed 0, bos: {bos})"


def test_windows_do_not_overlap_and_may_use_all_of_the_text() -> None:
    text = "".join(map(chr, range(100, 160)))
    data = load_batches([text], Letters(), samples=10, length=6, seed=3)
    assert sorted("".join(spelled(data))) == sorted(text)
    assert spelled(data) != sorted(spelled(data))


def test_bos_before_each_document() -> None:
    data = load_batches(["ab", "", "cde", "f"], Letters(), samples=1, length=9, bos="document")
    assert spelled(data) == ["\x01ab\x01cde\x01f"]


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "ab", "body": "x\\u2028y"}\n\n{"text": "cd", "body": "z"}\n', encoding="utf-8")
    assert text_documents(path, "text") == ["ab", "cd"]
    assert text_documents(path, "body") == ["x\u2028y", "z"]
    assert spelled(load_batches(path, Letters(), samples=1, length=4)) == ["abcd"]
    with pytest.raises(QCompileError, match=r"line 1 has no text under 'story'; it has 'text', 'body': give field="):
        load_batches(path, Letters(), samples=1, length=2, field="story")
    path.write_text('{"text": "ab"}\n{"text"')
    with pytest.raises(QCompileError, match="line 2 is not JSON"):
        load_batches(path, Letters(), samples=1, length=2)
    path.write_text('["ab"]')
    with pytest.raises(QCompileError, match="line 1 has no text under 'text'; it has a list"):
        load_batches(path, Letters(), samples=1, length=2)


def test_a_portion_of_a_large_file_is_whole_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"text": f"é{i}"}, ensure_ascii=False) + "\n" for i in range(1000)))
    first, second = (text_documents(path, "text", 500, seed) for seed in (0, 1))
    assert first == text_documents(path, "text", 500, 0)
    assert first != second
    assert 10 < len(first) < 60
    start = int(first[0][1:])
    assert first == [f"é{i}" for i in range(start, start + len(first))]
    path = tmp_path / "one_line.txt"
    path.write_text("é" * 1000)
    (text,) = text_documents(path, "text", 500, 0)
    assert set(text) == {"é"}
    assert len(text) in (249, 250)


def test_token_rows(tmp_path: Path) -> None:
    rows = torch.arange(12).reshape(3, 4)
    np.save(tmp_path / "a.npy", rows.numpy().astype(np.uint16))
    save_file({"other": rows.float(), "tokens": rows.int()}, tmp_path / "a.safetensors")
    sources = [rows, rows.int(), rows.numpy(), tmp_path / "a.npy", tmp_path / "a.safetensors"]
    batched = [[rows[:2], rows[2:]], [{"input_ids": rows}], iter([rows.tolist()])]
    for source in [*sources, *batched]:
        data = load_batches(source, samples=3, length=4)
        assert torch.equal(data.tokens, rows)
        assert data.tokens.dtype == torch.int64
    assert load_batches(rows, samples=2, length=3).tokens.tolist() == [[0, 1, 2], [4, 5, 6]]
    assert load_batches(torch.arange(6), samples=1, length=6).tokens.tolist() == [[0, 1, 2, 3, 4, 5]]


def test_token_lists_are_documents() -> None:
    assert load_batches([[5, 6], torch.tensor([7])], samples=1, length=3).tokens.tolist() == [[5, 6, 7]]
    passages = load_passages([[5, 6], [7]], Letters(), length=4, mode="documents")
    assert [p.tolist() for p in passages.sequences] == [[1, 5, 6], [1, 7]]
    assert passages.characters is None


def test_an_endless_iterable_is_left_off() -> None:
    def endless() -> Iterator[list[int]]:
        while True:
            yield [1, 2, 3]

    assert load_batches(endless(), samples=2, length=5).samples == 2


def test_a_pickle_is_never_executed(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    with pytest.raises(QCompileError, match="does not read as tokens"):
        load_batches(tmp_path / "a.npy", samples=1, length=1)


def test_what_cannot_be_read_is_refused(tmp_path: Path) -> None:
    (tmp_path / "bad.txt").write_bytes(b"abc\xff")
    (tmp_path / "bad.safetensors").write_bytes(b"abc")
    save_file({"a": torch.ones(1), "b": torch.ones(1)}, tmp_path / "two.safetensors")
    rows = torch.zeros(2, 3, dtype=torch.int64)
    refused: list[tuple[Any, str]] = [
        (tmp_path / "none.txt", "does not exist"),
        ("missing.jsonl", "does not exist"),
        ("./missing", "does not exist"),
        (tmp_path, "is a directory"),
        (tmp_path / "bad.txt", "is not UTF-8 text \\(byte 3\\)"),
        (tmp_path / "bad.safetensors", "does not read as tokens"),
        (tmp_path / "two.safetensors", r"holds \['a', 'b'\]; name the one"),
        ("wikitext3", "is no file and no known dataset; give 'generated', a path, one of wikitext2, c4"),
        ("generated", "is written by the model: give program="),
        (3, "data is a int"),
        ([rows, "text"], "mixes batches"),
        ([rows, rows[:, :2]], r"lengths \[2, 3\]"),
        ([[1, 2.5]], "give text, or integers"),
        (torch.rand(2, 3), "give integers of shape"),
        (torch.zeros(1, 3, dtype=torch.int64), "1 × 3 tokens are less than 2 samples of 3; .* samples=1, length=3"),
        (torch.zeros(2, 2, dtype=torch.int64), "less than 2 samples of 3; .* samples=2, length=2"),
        (torch.full((2, 3), -1), "token -1 is negative"),
        (["abcd"], "given data has 4 tokens; 2 samples of 3 need 6: ask for at most 1 samples, or give more text"),
        (["ab"], "has 2 tokens; .* sequences of at most 2"),
    ]
    for source, message in refused:
        with pytest.raises(QCompileError, match=message):
            load_batches(source, Letters(), samples=2, length=3)


def test_options_that_do_not_fit_are_refused() -> None:
    rows = torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(QCompileError, match="text needs a tokenizer"):
        load_batches(["abc"], samples=1, length=2)
    with pytest.raises(QCompileError, match="names such a token; give bos='none'"):
        load_batches(["abc"], Letters(bos_token_id=None), samples=1, length=2, bos="document")
    with pytest.raises(QCompileError, match="bos is 'always'; give one of none, document, sequence"):
        load_batches(["abc"], Letters(), samples=1, length=2, bos="always")  # type: ignore[arg-type]
    with pytest.raises(QCompileError, match="0 samples of 3 tokens"):
        load_batches(rows, samples=0, length=3)
    with pytest.raises(QCompileError, match="batch is 0"):
        load_batches(rows, samples=1, length=3, batch=0)
    with pytest.raises(QCompileError, match="mode is 'all'"):
        load_passages(rows, length=3, mode="all")  # type: ignore[arg-type]
    with pytest.raises(QCompileError, match="length is not given"):
        load_passages(rows)


def test_the_program_is_asked_what_it_takes() -> None:
    program = Program.parse(
        "def main(input_ids: i64[batch, sequence], *, table: f32[9, 9]):\n"
        '    logits = aten.embedding.default(table, input_ids)\n    return {"logits": logits}'
    )
    program.info.update(max_positions=4, vocab_size=9, bos_token_id=[2, 1])
    rows = torch.full((1, 4), 9)
    with pytest.raises(QCompileError, match="given tokens has token 9, the model's vocabulary 9"):
        load_batches(rows, samples=1, length=4, program=program)
    with pytest.raises(QCompileError, match="sequences of 5 tokens exceed the model's 4 positions; give length=4"):
        load_batches(rows, samples=1, length=5, program=program)
    assert load_batches([[3, 4, 5]], samples=1, length=4, program=program, bos="document").tokens.tolist() == [
        [2, 3, 4, 5]
    ]
    assert [p.tolist() for p in load_passages([[3, 4, 5, 6]], program=program).sequences] == [[2, 3, 4, 5], [2, 6]]


# ---------------------------------------------------------------- evaluation


def test_strided_windows_score_every_token_once() -> None:
    text = ALPHABET[:11]
    for length, stride in ((4, 4), (4, 1), (5, 3), (20, 20)):
        passages = load_passages([text], Letters(), length=length, stride=stride, bos="none")
        scored = [ids[first:] for ids, first in zip(passages.sequences, passages.scored_from, strict=True)]
        spelled_out = Letters().decode(torch.cat(scored).tolist())
        skipped = set(text[::stride]) if stride == length else {"a"}  # side by side, nothing predicts a first token
        assert spelled_out == "".join(c for c in text if c not in skipped)
        assert passages.characters == len(spelled_out) == passages.scored
        assert all(len(ids) <= length for ids in passages.sequences)
        context = min(first for first in passages.scored_from[1:]) if len(passages.scored_from) > 1 else length
        assert context >= max(1, length - stride)


def test_strided_with_a_first_token() -> None:
    passages = load_passages([ALPHABET[:7]], Letters(), length=4)
    assert [Letters().decode(p.tolist()) for p in passages.sequences] == ["\x01abc", "\x01def", "\x01g"]
    assert passages.scored_from == (1, 1, 1)
    assert passages.characters == passages.scored == 7
    limited = load_passages([ALPHABET], Letters(), length=4, limit=2)
    assert [Letters().decode(p.tolist()) for p in limited.sequences] == ["\x01abc", "\x01def"]
    assert limited.describe() == "2 sequences, 6 scored tokens, given data"


def test_documents_by_themselves() -> None:
    texts = ["abcdef", "", "gh", "i"]
    passages = load_passages(texts, Letters(), length=4, mode="documents")
    assert [Letters().decode(p.tolist()) for p in passages.sequences] == ["\x01abc", "\x01gh", "\x01i"]
    assert passages.characters == 6
    bare = load_passages(texts, Letters(), length=4, mode="documents", bos="none", limit=2)
    assert [Letters().decode(p.tolist()) for p in bare.sequences] == ["abcd", "gh"]
    assert bare.characters == 4
    assert bare.fingerprint != passages.fingerprint


def test_what_has_nothing_to_predict_is_refused() -> None:
    for mode in ("strided", "documents"):
        with pytest.raises(QCompileError, match="nothing to predict"):
            load_passages(["a"], Letters(), length=4, mode=mode, bos="none")  # type: ignore[arg-type]
    with pytest.raises(QCompileError, match="stride is 4; give 1 to 3"):
        load_passages(["abc"], Letters(), length=4, stride=4)
    with pytest.raises(QCompileError, match="scored from token 3"):
        Passages((torch.arange(3),), (3,))
    with pytest.raises(QCompileError, match="1 sequences, 0 starts"):
        Passages((torch.arange(3),), ())


# ---------------------------------------------------------------- the hub, played by a small module


class Rows(list[dict[str, Any]]):
    def shuffle(self, seed: int, buffer_size: int) -> Rows:
        return Rows(self[seed:] + self[:seed])


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    asked: list[tuple[Any, ...]] = []

    def load_dataset(repo: str, config: str | None, *, split: str, streaming: bool) -> Rows:
        asked.append((repo, config, split, streaming))
        if repo == "no/where":
            raise ConnectionError("name resolution failed\nand more")
        return Rows({"text": word, "article": word.upper(), "n": 1} for word in ("ab", "cd", "ef"))

    module = ModuleType("datasets")
    module.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", module)
    return asked


def test_datasets_by_name(hub: list[tuple[Any, ...]]) -> None:
    assert spelled(load_batches("c4", Letters(), samples=1, length=6, seed=1)) == ["cdefab"]
    assert spelled(load_batches("wikitext2", Letters(), samples=1, length=10, seed=1)) == ["ab\n\ncd\n\nef"]
    assert spelled(load_batches("cnn_dailymail", Letters(), samples=1, length=6, seed=0)) == ["ABCDEF"]
    assert spelled(load_batches("owner/name:small", Letters(), samples=1, length=6, seed=0)) == ["abcdef"]
    passages = load_passages("wikitext2", Letters(), length=16)
    assert [Letters().decode(p.tolist()) for p in passages.sequences] == ["\x01ab\n\ncd\n\nef"]
    load_passages("owner/name:small:held_out", Letters(), length=16)
    assert hub == [
        ("allenai/c4", "en", "train", True),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "train", False),
        ("abisee/cnn_dailymail", "3.0.0", "train", True),
        ("owner/name", "small", "train", True),
        ("Salesforce/wikitext", "wikitext-2-raw-v1", "test", False),
        ("owner/name", "small", "held_out", True),
    ]


def test_what_the_hub_does_not_give_is_refused(hub: list[tuple[Any, ...]], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        QCompileError, match=r"'no/where' \(no/where, split 'train'\) could not be read: name resolution"
    ):
        load_batches("no/where", Letters(), samples=1, length=2)
    with pytest.raises(QCompileError, match=r"no text under 'body'; it has \['article', 'n', 'text'\]"):
        load_batches("c4", Letters(), samples=1, length=2, field="body")
    with pytest.raises(QCompileError, match="c4 has 6 tokens"):
        load_batches("c4", Letters(), samples=9, length=2)
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(QCompileError, match="'pile' needs the datasets package: pip install datasets"):
        load_batches("pile", Letters(), samples=1, length=2)
