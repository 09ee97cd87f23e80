"""Architectures of transformers, tiny and random: captured, printed, parsed, verified, exported to int4 ONNX, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import qcompile
from qcompile import Program
from qcompile.artifact import WEIGHT_ONLY_TOLERANCE

COMMON: dict[str, Any] = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": None,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen3": {},
    "opt": {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "n_positions": 64},
    "gemma3_text": {"sliding_window": 8, "sliding_window_pattern": 2},
    "phi3": {},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64, "decoder_sparse_step": 1},
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    renamed = {"opt", "gpt2"}
    common = {
        k: v for k, v in COMMON.items() if request.param not in renamed or not k.startswith(("num_key", "head_dim"))
    }
    config = AutoConfig.for_model(request.param, **{**common, **FAMILIES[request.param]})
    instance = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in instance.named_parameters():
            if parameter.ndim == 1:  # gains of 1 and biases of 0 hide errors
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in name:
                parameter.mul_(3)
    folder = tmp_path_factory.mktemp(request.param)
    instance.save_pretrained(folder)
    return folder


def test_captures_prints_parses_verifies_exports(model: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    program = qcompile.capture(model)
    program.verify()
    ids = torch.randint(0, 96, (2, 11), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        theirs = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)(ids).logits
    ours = program(ids)
    assert float((ours - theirs).abs().max() / theirs.abs().max()) <= 1e-5

    text = str(program)
    parsed = Program.parse(text, program.weights)
    assert str(parsed) == text
    assert torch.equal(parsed(ids), ours)

    compiled = qcompile.compile(program, "int4-g128", overrides=["weights.group=32"])
    artifact = compiled.export("onnx_qcdq", tmp_path / "out")
    assert artifact.manifest.agreement is not None
    assert artifact.manifest.agreement.max_relative_error <= WEIGHT_ONLY_TOLERANCE
    quantized = [t for t in artifact.manifest.tensors.values() if t.spec is not None]
    assert all(t.bits_per_element <= 5 for t in quantized)  # 4, and a float32 scale for 32 codes
    assert len(quantized) >= 8
    prompt = torch.tensor([[1, 5, 9]])
    assert torch.equal(artifact.generate(prompt, 16), compiled.generate(prompt, 16))
