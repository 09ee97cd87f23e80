"""The families: one row each, small enough that a model is made and captured in seconds."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

VOCABULARY, LIMIT = 96, 64  # token ids, and the longest input
CHUNK = 8  # tokens in a chunk of a scan; a graph with scans is right for inputs of one chunk


@dataclass(frozen=True)
class Family:
    """A model type of transformers with the values of its configuration.

    Args:
        config: options of the configuration; `COMMON` fills in those that are not given.
        auto: the auto class that makes the model.
        common: which options of `COMMON` the configuration knows; the others would be ignored attributes.
        example: what the model takes: token ``ids``, ``image`` or ``cross`` (ids, and the states of an encoder).
        model_type: the type's name, where the family has another.
        default: whether the tests that look at a part of the families look at it.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    auto: str = "AutoModelForCausalLM"
    common: bool = True
    example: str = "ids"
    model_type: str | None = None
    default: bool = False


COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": LIMIT,
}
ALL_HEADS = {"num_key_value_heads": 4}  # families without grouped queries
GPT: dict[str, Any] = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": LIMIT}
WINDOW: dict[str, Any] = {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]}
LINEAR_ATTENTION: dict[str, Any] = {
    "max_position_embeddings": CHUNK,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2}
LOCAL_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NARROW_EXPERTS = {**EXPERTS, "moe_intermediate_size": 24}
LATENT = {"kv_lora_rank": 16, "q_lora_rank": 24, "qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 12}
LATENT_EXPERTS: dict[str, Any] = {
    **ALL_HEADS,
    **LATENT,
    "moe_intermediate_size": 24,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
    "head_dim": 4,
}
MULTIPLIERS = {
    "embedding_multiplier": 1.7,
    "logits_scaling": 1.3,
    "residual_multiplier": 0.6,
    "attention_multiplier": 0.4,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_n_groups": 2, "mamba_d_state": 8}
MAMBA |= {"mamba_chunk_size": 2 * CHUNK, "max_position_embeddings": CHUNK}
ENCODER: dict[str, Any] = {"type_vocab_size": 2}
IMAGE: dict[str, Any] = {"image_size": 16, "patch_size": 4, "num_channels": 3}

FAMILIES: dict[str, Family] = {
    "llama": Family(default=True),
    "mistral": Family({"sliding_window": 4}),
    "qwen2": Family(),
    "qwen3": Family(default=True),
    "qwen3_5": Family(LINEAR_ATTENTION, model_type="qwen3_5_text"),
    "qwen3_next": Family({**LINEAR_ATTENTION, **NARROW_EXPERTS, "shared_expert_intermediate_size": 24}),
    "gemma": Family(),
    "gemma2": Family({**WINDOW, "query_pre_attn_scalar": 8}, default=True),
    "gemma3_text": Family({**WINDOW, "query_pre_attn_scalar": 8}),
    "gemma3n_text": Family(
        {
            **WINDOW,
            "num_hidden_layers": 4,
            "layer_types": WINDOW["layer_types"] * 2,
            "intermediate_size": [48] * 4,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "laurel_rank": 8,
            "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        },
    ),
    "gemma4_text": Family(
        {
            **WINDOW,
            "num_hidden_layers": 4,
            "layer_types": WINDOW["layer_types"] * 2,
            "vocab_size_per_layer_input": VOCABULARY,
            "hidden_size_per_layer_input": 8,
            "num_kv_shared_layers": 2,
            "global_head_dim": 16,
        }
    ),
    "phi": Family({**ALL_HEADS, "qk_layernorm": True}),
    "phi3": Family({"pad_token_id": None}),
    "opt": Family({"ffn_dim": 48, "word_embed_proj_dim": 32}, default=True),
    "gpt2": Family(GPT, common=False, default=True),
    "gptj": Family({**GPT, "rotary_dim": 4}, common=False),
    "gpt_neo": Family(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_layers": 2,
            "num_heads": 4,
            "attention_types": [[["global", "local"], 1]],
            "window_size": 4,
            "max_position_embeddings": LIMIT,
        },
        common=False,
    ),
    "gpt_neox": Family(),
    "gpt_bigcode": Family(GPT, common=False),
    "bloom": Family(
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}, common=False, default=True
    ),
    "falcon": Family(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "multi_query": True,
            "bias": True,
            "ffn_hidden_size": 48,
            "max_position_embeddings": LIMIT,
        },
        common=False,
    ),
    "mpt": Family(
        {"vocab_size": VOCABULARY, "d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": LIMIT}, common=False
    ),
    "codegen": Family({**GPT, "n_ctx": LIMIT, "rotary_dim": 4}, common=False),
    "cohere": Family({"use_qk_norm": True}, default=True),
    "cohere2": Family(WINDOW),
    "olmo": Family(),
    "olmo2": Family(),
    "granite": Family(MULTIPLIERS),
    "starcoder2": Family(),
    "stablelm": Family({"qk_layernorm": True, "use_qkv_bias": True}, default=True),
    "nemotron": Family(),
    "glm4": Family(),
    "smollm3": Family({"no_rope_layers": [1, 0]}),
    "exaone4": Family(WINDOW),
    "persimmon": Family({"qk_layernorm": True}),
    "mixtral": Family(LOCAL_EXPERTS, default=True),
    "qwen2_moe": Family({**NARROW_EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3_moe": Family(NARROW_EXPERTS),
    "olmoe": Family(EXPERTS),
    "gpt_oss": Family({**LOCAL_EXPERTS, **WINDOW}, default=True),
    "dbrx": Family(
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "n_layers": 2,
            "n_heads": 4,
            "max_seq_len": LIMIT,
            "attn_config": {"kv_n_heads": 2, "clip_qkv": 1.5, "rope_theta": 10000.0},
            "ffn_config": {"hidden_size": 32, "ffn_hidden_size": 24, "moe_num_experts": 4, "moe_top_k": 2},
        },
        common=False,
        default=True,
    ),
    "deepseek_v2": Family(LATENT_EXPERTS),
    "deepseek_v3": Family(LATENT_EXPERTS),
    "phimoe": Family(LOCAL_EXPERTS),
    "granitemoe": Family({**LOCAL_EXPERTS, **MULTIPLIERS}),
    "llama4_text": Family(
        {
            "num_local_experts": 4,
            "intermediate_size_mlp": 40,
            "num_hidden_layers": 2,
            "interleave_moe_layer_step": 2,
            "no_rope_layers": [1, 0],
            "attention_chunk_size": 16,
        }
    ),
    "jamba": Family(
        {
            **EXPERTS,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        }
    ),
    "bamba": Family({**MAMBA, "attn_layer_indices": [1]}),
    "mamba2": Family(
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "num_heads": 8,
            "head_dim": 8,
            "state_size": 8,
            "n_groups": 2,
            "chunk_size": 2 * CHUNK,
            "max_position_embeddings": CHUNK,
        },
        common=False,
    ),
    "bert": Family(ENCODER, auto="AutoModelForMaskedLM", default=True),
    "roberta": Family({**ENCODER, "max_position_embeddings": LIMIT + 2}, auto="AutoModelForMaskedLM"),
    "vit": Family(IMAGE, auto="AutoModelForImageClassification", example="image", default=True),
    "resnet": Family(
        {"embedding_size": 8, "hidden_sizes": [16, 32], "depths": [2, 1], "layer_type": "bottleneck", "num_labels": 6},
        auto="AutoModelForImageClassification",
        common=False,
        example="image",
    ),
    "whisper": Family(
        {
            "vocab_size": VOCABULARY,
            "d_model": 32,
            "decoder_layers": 2,
            "decoder_attention_heads": 4,
            "decoder_ffn_dim": 48,
            "encoder_layers": 1,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "max_target_positions": LIMIT,
            "max_source_positions": 16,
            "pad_token_id": 0,
        },
        common=False,
        example="cross",
        default=True,
    ),
}
