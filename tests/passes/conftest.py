"""Models that several passes are tested on: the embedded ones in float64, and tiny random decoders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import pytest
import torch

from qcompile import capture, run_passes
from qcompile.capture.dtypes import widen
from qcompile.ir.program import Program
from qcompile.zoo import path


@cache
def _embedded(name: str) -> Program:
    program = capture(path(name), dtype=torch.float64)
    widen(program)
    run_passes(program, "raise-norms")
    generator = torch.Generator().manual_seed(5)
    for node in program.weight_nodes:
        if node.meta["val"].ndim == 1 and node.meta["val"].dtype == torch.float64:  # gains and biases
            weight = program.weight(node)
            noise = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
            program.set_weight(node, weight + 0.3 * weight.abs().mean() * noise)
    return program


@pytest.fixture(scope="session")
def embedded() -> Callable[[str], Program]:
    """A fresh copy of an embedded model in float64, norms raised, gains and biases away from where they were."""
    return lambda name: _embedded(name).clone()


def _random_decoder(name: str, config: Mapping[str, Any]) -> torch.nn.Module:
    from transformers import AutoConfig, AutoModelForCausalLM

    tokens = {"vocab_size": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": None}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **tokens, **config))
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:  # gains of 1 and biases of 0 hide errors
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif "embed" not in key:
                parameter.mul_(3)  # so that attention tells tokens apart
    model.set_experts_implementation("batched_mm")  # the default has no float64
    return model.eval()  # type: ignore[no-any-return]


@pytest.fixture(scope="session")
def random_decoder() -> Callable[[str, Mapping[str, Any]], torch.nn.Module]:
    """Architecture and sizes → a decoder of transformers with seeded weights, for 64 tokens."""
    return _random_decoder
