"""Tiny random decoders of transformers, captured with their cache: one of each way to attend."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch

from qcompile.capture import capture
from qcompile.ir.program import Program

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
_MLA = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 16,
    "q_lora_rank": 12,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "head_dim": 4,
    "v_head_dim": 6,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "moe_intermediate_size": 16,
    "n_group": 1,
    "topk_group": 1,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": _LLAMA,  # grouped queries, rotary positions, norms of queries and keys
    "mistral": {**_LLAMA, "sliding_window": 4},
    "gemma2": {**_LLAMA, "sliding_window": 4, "query_pre_attn_scalar": 8},  # soft-capping, spelled out
    "gpt_oss": {**_LLAMA, "sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},  # sinks
    "deepseek_v3": {**_LLAMA, **_MLA},  # a latent for a cache, values narrower than keys
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # fused projections
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},  # spelled out with baddbmm, heads in the batch
}


@pytest.fixture(scope="session")
def cached_decoder(
    random_decoder: Callable[[str, Mapping[str, Any]], torch.nn.Module],
) -> Callable[..., tuple[torch.nn.Module, Program]]:
    """Architecture (and dtype) → a model and its program, a fresh copy, of the same steps; the model is shared.

    In float64 an attention whose softmax is float32 takes no padding: its masks become infinite there.
    """
    made: dict[tuple[str, torch.dtype], tuple[torch.nn.Module, Program]] = {}

    def make(name: str, dtype: torch.dtype = torch.float32) -> tuple[torch.nn.Module, Program]:
        if (name, dtype) not in made:
            model = random_decoder(name, ARCHITECTURES[name]).to(dtype)
            made[name, dtype] = model, capture(model)
        model, program = made[name, dtype]
        return model, program.clone()

    return make
