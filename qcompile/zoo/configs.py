"""Shapes of the embedded models, and how each is trained.

Every width that a linear layer reduces over (128, 256, 384 or 512) is a multiple of 128, so that all group sizes up to
128 divide it. Sizes are chosen to stay below 1.5 million parameters, which is 3 MB in float16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from transformers import LlamaConfig, MixtralConfig, OPTConfig, PreTrainedConfig

from qcompile.zoo.tokenizer import BOS, EOS, VOCAB

POSITIONS = 256
"""Longest sequence of the models, in tokens; they are trained at this length, so every position is used."""

SHORT = 32
"""Length of the sequences with which training begins, where a recipe asks for it."""

INIT = 0.06
"""Standard deviation of the first weights, where the embedding is not also the head.

The usual 0.02 is for widths near 1000.
"""


@dataclass(frozen=True)
class Recipe:
    """How long and how hard to train; a step sees `batch` sequences of ``POSITIONS`` tokens.

    The first `short_steps` steps see as many tokens in sequences of ``SHORT``, at positions that begin anywhere.
    Attention that starts out uniform sees more of the previous token there; learned positions need that help.
    """

    steps: int
    short_steps: int = 0
    dropout: float = 0.1
    batch: int = 8
    warmup: int = 100
    peak_lr: float = 3e-3
    final_lr: float = 3e-5
    weight_decay: float = 0.1
    eval_every: int = 400
    bf16: bool = True  # Matrix products of training in bfloat16; weights and the measured losses stay in float32.
    seed: int = 0


def llama() -> LlamaConfig:
    """6 layers, 4 query heads sharing 2 key/value heads of width 32."""
    return LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=POSITIONS,
        rms_norm_eps=1e-5,
        initializer_range=INIT,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


def opt() -> OPTConfig:
    """5 layers, 4 heads of width 32.

    There is no padding token: the default one would be ``<s>``, whose embedding would then never be trained.
    """
    return OPTConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        ffn_dim=512,
        num_hidden_layers=5,
        num_attention_heads=4,
        max_position_embeddings=POSITIONS,
        do_layer_norm_before=True,
        dropout=0.0,
        attention_dropout=0.0,
        pad_token_id=None,
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=True,
    )


def moe() -> MixtralConfig:
    """3 layers of 4 experts, of which the router picks 2 for each token; attention as in :func:`llama`."""
    return MixtralConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        initializer_range=INIT,
        max_position_embeddings=POSITIONS,
        sliding_window=None,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        bos_token_id=BOS,
        eos_token_id=EOS,
        tie_word_embeddings=False,
    )


MODELS: dict[str, tuple[Callable[[], PreTrainedConfig], Recipe]] = {
    "llama": (llama, Recipe(steps=1600)),
    "opt": (opt, Recipe(steps=1400, short_steps=350, peak_lr=2e-3)),
    "moe": (moe, Recipe(steps=1200, bf16=False)),  # Rounding would change which experts the router picks.
}
