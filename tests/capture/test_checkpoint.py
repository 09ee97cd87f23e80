"""Weights come from the shards that hold them, converted as transformers converts them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import build, error, save, tokens
from safetensors.torch import load_file, save_file

from qcompile.capture import capture
from qcompile.capture.checkpoint import NotLazy


def test_experts_are_merged_when_read(captured: Callable[[str], Any]) -> None:
    case = captured("mixtral")
    stored = load_file(case.directory / "model.safetensors")
    assert any(".experts.3." in name for name in stored)  # one matrix an expert on disk …
    for name, parameter in case.model.named_parameters():
        assert torch.equal(case.program.weights[name], parameter), name  # … one 3-D parameter in the model


def test_many_shards_equal_one(captured: Callable[[str], Any], tmp_path: Path) -> None:
    case, ids = captured("qwen3_moe"), tokens()
    case.model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert (tmp_path / "model.safetensors.index.json").is_file()
    assert torch.equal(capture(tmp_path)(ids), case.program(ids))


def test_a_tied_embedding_is_one_weight_under_either_name(captured: Callable[[str], Any], tmp_path: Path) -> None:
    case, ids = captured("qwen3"), tokens()
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    assert sum(n.meta["weight"] in (embedding, head) for n in case.program.weight_nodes) == 1
    tensors = load_file(case.directory / "model.safetensors")
    (tmp_path / "config.json").write_text((case.directory / "config.json").read_text())
    shared = tensors.pop(embedding)
    for names in ([head], [embedding, head]):
        copies = {name: shared.clone() for name in names}
        save_file({**tensors, **copies}, tmp_path / "model.safetensors")
        program = capture(tmp_path)
        assert sum(n.meta["weight"] in (embedding, head) for n in program.weight_nodes) == 1
        assert torch.equal(program(ids), case.program(ids))
        assert program.info["notes"] == []


def test_a_tie_that_the_checkpoint_breaks_is_not_made(captured: Callable[[str], Any], tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    case, ids = captured("qwen3"), tokens()
    tensors = load_file(case.directory / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"] + 1
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((case.directory / "config.json").read_text())
    program = capture(tmp_path)
    assert "not tied" in program.info["notes"][0]
    with torch.no_grad():
        assert error(program(ids), AutoModelForCausalLM.from_pretrained(tmp_path)(ids).logits) <= 1e-5


def test_tensors_that_nothing_reads_are_noted(tmp_path: Path) -> None:
    save("llama", tmp_path, num_hidden_layers=1)
    tensors = load_file(tmp_path / "model.safetensors")
    save_file({**tensors, "extra.weight": torch.ones(2)}, tmp_path / "model.safetensors")
    assert capture(tmp_path).info["notes"] == ["the checkpoint's tensor 'extra.weight' is no part of LlamaForCausalLM"]


def test_what_is_not_lazy_is_loaded_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise NotLazy("a conversion needs values")

    monkeypatch.setattr("qcompile.capture.pretrained.resolve", refuse)
    model, ids = build("llama", num_hidden_layers=1), tokens()
    model.save_pretrained(tmp_path)
    program = capture(tmp_path)
    assert program.info["notes"] == ["all weights were loaded into memory: a conversion needs values"]
    with torch.no_grad():
        assert error(program(ids), model(ids).logits) <= 1e-5
