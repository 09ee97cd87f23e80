"""Experts that transformers computes in a loop: without it they come to the same, and models with them are captured."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from capture_models import VOCABULARY, error, reference, tokens

from qcompile.capture import capture
from qcompile.capture.experts import without_loops

CONFIG: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "d_model": 16,
    "n_layers": 1,
    "n_heads": 2,
    "max_seq_len": 64,
    "attn_config": {"kv_n_heads": 1, "clip_qkv": 1.5, "rope_theta": 10000.0},
    "ffn_config": {"hidden_size": 16, "ffn_hidden_size": 12, "moe_num_experts": 5, "moe_top_k": 3},
    "tie_word_embeddings": False,
}


@pytest.fixture
def model() -> Any:
    from transformers import DbrxConfig, DbrxForCausalLM

    torch.manual_seed(0)
    model = DbrxForCausalLM(DbrxConfig(**CONFIG)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model


def test_without_the_loop_it_is_the_same_and_left_as_it_was(model: Any) -> None:
    experts = model.transformer.blocks[0].ffn.experts.double()
    x, choices = torch.randn(2, 7, 16, dtype=torch.float64), torch.rand(14, 5).argsort(1)[:, :3]
    weights = torch.rand(14, 3, dtype=torch.float64)
    wanted = experts(x, choices, weights)
    with without_loops(model):
        found = experts(x, choices, weights)
    assert not torch.equal(found, wanted)  # other sums, in another order
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    assert torch.equal(experts(x, choices, weights), wanted)


def test_captured_from_a_directory(model: Any, tmp_path: Path) -> None:
    model.save_pretrained(tmp_path)
    program, ids = capture(tmp_path), tokens(3, 9)
    assert error(program(ids), reference(model, ids, torch.ones_like(ids))) <= 1e-5
