"""Tiny random decoders, and what rounding their weights by a recipe gives."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import pytest
import torch

import qcompile
from qcompile.capture import capture
from qcompile.compiled import CompiledModel
from qcompile.ir.program import Program

_LLAMA = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": _LLAMA,  # queries and keys have norms and rotary positions behind their products
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},  # fused projections, addmm, biases
    "qwen3_moe": {**_LLAMA, "num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
}
DATA = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="session")
def tiny(random_decoder: Callable[[str, Mapping[str, Any]], torch.nn.Module]) -> Callable[[str], Program]:
    """Architecture → its program, a fresh copy."""
    made: dict[str, Program] = {}

    def make(name: str) -> Program:
        if name not in made:
            made[name] = capture(random_decoder(name, ARCHITECTURES[name]))
        return made[name].clone()

    return make


Compiled = Callable[..., CompiledModel]


@pytest.fixture(scope="session")
def compiled(tiny: Callable[[str], Program]) -> Compiled:
    """Passes (and specs, and settings of the calibration) → the compiled model; each is made once."""
    made: dict[str, CompiledModel] = {}

    def make(
        passes: Sequence[str],
        weights: str | None = "int4 sym group=16",
        activations: str | None = None,
        model: str = "qwen3",
        calibration: Mapping[str, Any] | None = None,
    ) -> CompiledModel:
        key = repr((list(passes), weights, activations, model, calibration))
        if key not in made:
            settings = {"samples": len(DATA), "length": DATA.shape[1], **(calibration or {})}
            recipe = {"weights": weights, "passes": list(passes), "activations": activations, "calibration": settings}
            made[key] = qcompile.compile(tiny(model), recipe, DATA)
        return made[key]

    return make
