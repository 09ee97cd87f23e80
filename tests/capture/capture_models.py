"""Tiny random models of transformers, saved as a user would have them, with weights that hide nothing.

Gains away from 1, biases away from 0: a norm or bias that is dropped or doubled then shows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

VOCABULARY, LENGTH, WINDOW = 97, 12, 4

_LLAMA: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
_MOE = {"num_experts_per_tok": 2}

CONFIGS: dict[str, dict[str, Any]] = {
    "llama": {**_LLAMA, "model_type": "llama", "num_hidden_layers": 2, "tie_word_embeddings": False},
    "qwen3": {**_LLAMA, "model_type": "qwen3", "tie_word_embeddings": True},
    "opt": {
        "model_type": "opt",
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "word_embed_proj_dim": 32,
        "ffn_dim": 40,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    },
    "gpt2": {
        "model_type": "gpt2",
        "vocab_size": VOCABULARY,
        "n_embd": 32,
        "n_layer": 1,
        "n_head": 4,
        "n_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    },
    "gemma3": {
        **_LLAMA,
        "model_type": "gemma3_text",
        "num_hidden_layers": 2,
        "sliding_window": WINDOW,
        "layer_types": ["sliding_attention", "full_attention"],
        "query_pre_attn_scalar": 8,
    },
    "phi3": {**_LLAMA, "model_type": "phi3", "sliding_window": WINDOW, "tie_word_embeddings": False},
    "mixtral": {**_LLAMA, **_MOE, "model_type": "mixtral", "num_local_experts": 4},
    "qwen3_moe": {**_LLAMA, **_MOE, "model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 24},
}


def build(name: str, **changes: Any) -> Any:
    """A model of `CONFIGS[name]`, random with seed 0, every 1-D parameter perturbed."""
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    options = {**CONFIGS[name], **changes}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(options.pop("model_type"), **options)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            spread = 0.3 if parameter.ndim == 1 else 0.1
            parameter.add_(spread * torch.randn_like(parameter))
    return model


def save(name: str, directory: Path, **changes: Any) -> Path:
    """`build(name)` written with save_pretrained."""
    build(name, **changes).save_pretrained(directory)
    return directory


def tokens(batch: int = 2, length: int = LENGTH) -> Tensor:
    """Token ids ``[batch, length]``, none of them the padding."""
    return torch.randint(3, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def reference(model: Any, ids: Tensor, mask: Tensor, positions: bool = True) -> Tensor:
    """transformers' own logits, in one pass, with positions that count the tokens of the mask."""
    given = {"position_ids": (mask.cumsum(1) - 1).clamp(min=0)} if positions else {}
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, **given).logits
    return logits


def error(found: Tensor, wanted: Tensor) -> float:
    """max |Δ| / max |wanted|."""
    return float((found - wanted).abs().max() / wanted.abs().max())
