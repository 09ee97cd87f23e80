"""Programs that the tests lower."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import qcompile
from qcompile.ir.program import Program

VOCABULARY = 96

Spec = str | None


class Parallel(nn.Module):
    """Linear layers that read one x."""

    def __init__(self, names: list[str], inputs: int, outputs: int) -> None:
        super().__init__()
        for name in names:
            self.add_module(name, nn.Linear(inputs, outputs))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: layer(x) for name, layer in self.named_children()}


def quantized(program: Program, weights: Spec, activations: Spec = None) -> Program:
    """The program rounded by one recipe."""
    return qcompile.compile(program, {"weights": weights, "activations": activations}).program


def products(layers: Mapping[str, tuple[Spec, Spec]], inputs: int = 64, outputs: int = 48) -> Program:
    """``linear(x, W) + b`` for each layer, named by its key: weights and activations as given; x ``[batch, rows, inputs]``."""
    torch.manual_seed(0)
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("rows")}
    module = Parallel(list(layers), inputs, outputs).eval()
    program = qcompile.capture(torch.export.export(module, (torch.randn(2, 3, inputs),), dynamic_shapes={"x": sizes}))
    rules = [{"match": name, "weights": w, "activations": a} for name, (w, a) in layers.items()]
    return qcompile.compile(program, {"weights": None, "rules": rules}, overrides=["verify=off"]).program


def llama(heads: int = 4, kv_heads: int = 2, layers: int = 2, hidden: int = 64, inner: int = 96) -> Program:
    """A tiny random Llama, its logits large enough for a tolerance to mean something."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=16,
        max_position_embeddings=128,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.1 if "norm" in name else 0.15)
    return qcompile.capture(model)


def prompt(length: int = 9, batch: int = 2) -> Tensor:
    """Token ids."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(length))


def error(ours: Tensor, expected: Tensor) -> float:
    """max |Δ| / max |expected|."""
    return float((ours.double() - expected.double()).abs().max() / expected.double().abs().max())
