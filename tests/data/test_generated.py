"""Text that the model writes: right, repeatable, and kept."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest
import torch
from torch import Tensor

from qcompile.data import generated, load_batches, load_passages
from qcompile.data.generated import cache_folder, program_fingerprint, write_tokens
from qcompile.errors import QCompileError
from qcompile.ir.program import Program


def bigram(table: Tensor, **info: object) -> Program:
    program = Program.parse(
        "def main(input_ids: i64[batch, sequence], *, table: f32[6, 6]):\n"
        '    logits = aten.embedding.default(table, input_ids)\n    return {"logits": logits}',
        {"table": table},
    )
    program.info.update(info)
    return program


def random_table(seed: int = 0) -> Tensor:
    return torch.randn(6, 6, generator=torch.Generator().manual_seed(seed))


def test_the_model_writes_with_its_own_probabilities() -> None:
    table = random_table()
    tokens = write_tokens(bigram(table, bos_token_id=3), 400, 30, seed=0)
    assert tokens.shape == (400, 30)
    assert tokens.dtype == torch.int64
    assert bool((tokens[:, 0] == 3).all())
    pairs = torch.zeros(6, 6).index_put((tokens[:, :-1].flatten(), tokens[:, 1:].flatten()), torch.ones(()), True)
    assert torch.allclose(pairs / pairs.sum(1, keepdim=True), table.softmax(-1), atol=0.04)


def test_rows_are_the_same_however_many_are_written_at_a_time() -> None:
    program = bigram(random_table(), bos_token_id=0)
    whole = write_tokens(program, 7, 12, seed=1)
    assert torch.equal(whole, write_tokens(program, 7, 12, seed=1, rows=2))
    assert not torch.equal(whole, write_tokens(program, 7, 12, seed=2))


def test_without_a_first_token_texts_begin_anywhere() -> None:
    tokens = write_tokens(bigram(random_table()), 200, 2, seed=0)
    assert set(tokens[:, 0].tolist()) == set(range(6))


@pytest.mark.parametrize("eos", [2, [2, 5]])
def test_after_the_end_of_a_text_another_begins(eos: object) -> None:
    tokens = write_tokens(bigram(random_table(), bos_token_id=[4], eos_token_id=eos), 20, 30, seed=0)
    ended = torch.isin(tokens[:, :-1], torch.tensor(eos))
    assert bool(ended.any())
    assert set(tokens[:, 1:][ended].tolist()) == {4}


def test_what_was_written_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    program = bigram(random_table(), bos_token_id=0)
    first = load_batches("generated", samples=4, length=8, program=program)
    assert first.describe() == "4 × 8 tokens, written by the model (seed 0)"
    (file,) = tmp_path.rglob("*.safetensors")
    assert file.parent == tmp_path / "qcompile" / "generated"
    with monkeypatch.context() as patch:
        patch.setattr(generated, "write_tokens", None)  # not called again
        assert load_batches("generated", samples=4, length=8, program=program).fingerprint == first.fingerprint
    file.write_bytes(file.read_bytes()[:50])  # damaged: written again
    assert load_batches("generated", samples=4, length=8, program=program).fingerprint == first.fingerprint
    load_batches("generated", samples=4, length=8, seed=1, program=program)
    load_batches("generated", samples=4, length=8, program=bigram(random_table(), bos_token_id=1))
    load_batches("generated", samples=4, length=8, program=bigram(random_table(1), bos_token_id=0))
    assert len(list(tmp_path.rglob("*"))) == 2 + 4  # two folders, four files, nothing half written


def test_a_folder_that_cannot_be_written_is_said(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.warns(UserWarning, match="not kept for the next time"):
        load_batches("generated", samples=1, length=2, program=bigram(random_table()), cache_folder=tmp_path / "file")


def test_evaluation_has_its_own_text(tmp_path: Path) -> None:
    program = bigram(random_table(), bos_token_id=0, max_positions=9)
    passages = load_passages("generated", program=program, limit=3, cache_folder=tmp_path)
    assert [len(ids) for ids in passages.sequences] == [9, 9, 9]
    calibration = load_batches("generated", samples=3, length=9, program=program, cache_folder=tmp_path)
    assert not torch.equal(torch.stack(passages.sequences), calibration.tokens)


def test_a_fingerprint_sees_weights_and_graph() -> None:
    program = bigram(random_table())
    assert program_fingerprint(program) == program_fingerprint(bigram(random_table()))
    changed = program.clone()
    changed.weights["table"] = random_table() * 2
    assert program_fingerprint(changed) != program_fingerprint(program)
    other = Program.parse(str(program).replace("def main", "def main").replace('"logits"', '"scores"'), program.weights)
    assert program_fingerprint(other) != program_fingerprint(program)


def test_a_program_that_writes_nothing_is_refused() -> None:
    program = Program.parse(
        'def main(x: f32[2, 3]):\n    y = aten.relu.default(x)\n    return {"y": y}',
    )
    with pytest.raises(QCompileError, match=r"a program of \['x'\] → \['y'\] writes no text; give data="):
        load_batches("generated", samples=1, length=2, program=program)


def test_the_folder_of_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("LOCALAPPDATA", "local")
    for platform, part in (("linux", ".cache"), ("darwin", "Caches"), ("win32", "local")):
        monkeypatch.setattr("sys.platform", platform)
        assert part in cache_folder().parts
        assert "qcompile" in cache_folder().parts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
        assert cache_folder() == Path("/somewhere/qcompile")
