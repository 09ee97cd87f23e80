"""Programs that the tests lower, and what is asked of the files."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

import qcompile.ops  # noqa: F401
from qcompile.backend_base import LoweredFiles
from qcompile.backends.onnx_qcdq.runtime import open_session
from qcompile.capture import capture
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN

_SHORT = {torch.int8: "i8", torch.uint8: "u8", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}
VOCABULARY = 96


@dataclass(frozen=True)
class Lowered:
    """A program and its files."""

    program: Program
    directory: Path
    files: LoweredFiles


@dataclass(frozen=True)
class Layer:
    """One product of the `products` program."""

    weights: str
    activations: str | None = None
    bias: bool = True


def declare(name: str, key: str, tensor: Tensor) -> str:
    """A weight parameter of the IR text."""
    shape = ", ".join(map(str, tensor.shape)) or "()"
    return f'{name}: {_SHORT[tensor.dtype]}[{shape}] = "{key}"'


def products(layers: Mapping[str, Layer], inputs: int = 64, outputs: int = 32, rank: int = 3) -> Program:
    """``y_<name> = linear(x, W) + b`` for each layer; all read one x, ``[batch, sequence, inputs]`` or of rank 2."""
    torch.manual_seed(0)
    weights: dict[str, tuple[str, Tensor]] = {}
    body: list[str] = []
    for name, layer in layers.items():
        body += _layer(name, layer, torch.randn(outputs, inputs), rank, weights)
    declared = ", ".join(declare(short, key, tensor) for short, (key, tensor) in weights.items())
    sizes = "batch, sequence" if rank == 3 else "batch"
    returned = ", ".join(f'"y_{name}": y_{name}' for name in layers)
    lines = "\n    ".join([*body, f"return {{{returned}}}"])
    text = f"def main(x: f32[{sizes}, {inputs}], *, {declared}):\n    {lines}"
    return Program.parse(text, dict(weights.values()))


def _layer(name: str, layer: Layer, weight: Tensor, rank: int, weights: dict[str, tuple[str, Tensor]]) -> list[str]:
    code = QuantSpec.parse(layer.weights).quantize(weight)
    weights[f"{name}_c"] = (f"{name}.weight.codes", code.codes)
    weights[f"{name}_s"] = (f"{name}.weight.scale", code.scale)
    zero = "None"
    if code.zero_point is not None:
        weights[f"{name}_z"], zero = (f"{name}.weight.zero_point", code.zero_point), f"{name}_z"
    lines, x = [], "x"
    if layer.activations is not None:
        lines, x = _activation(name, layer, 2 * torch.randn(4, weight.shape[1])[(None,) * (rank - 2)] + 0.3, weights)
    lines.append(
        f'{name}_w: none = qcompile.dequantize.default({name}_c, {name}_s, {zero}, "{layer.weights}", torch.float32)'
    )
    bias = ""
    if layer.bias:
        weights[f"{name}_b"], bias = (f"{name}.bias", torch.randn(weight.shape[0])), f", {name}_b"
    return [*lines, f"y_{name}: none = aten.linear.default({x}, {name}_w{bias})  # {name}"]


def _activation(name: str, layer: Layer, x: Tensor, weights: dict[str, tuple[str, Tensor]]) -> tuple[list[str], str]:
    spec, text = QuantSpec.parse(layer.activations or ""), layer.activations
    scale, zero, lines = f"{name}_xs", None if spec.symmetric else f"{name}_xz", []
    if spec.when == "static":
        made = spec.quantize(x)
        weights[scale] = (f"{name}.input.scale", made.scale)
        if made.zero_point is not None:
            weights[f"{name}_xz"] = (f"{name}.input.zero_point", made.zero_point)
    else:
        lines = [f'{name}_p: none = qcompile.choose_qparams.default(x, "{text}")']
        lines.append(f"{scale}: none = operator.getitem({name}_p, 0)")
        if zero is not None:
            lines.append(f"{zero}: none = operator.getitem({name}_p, 1)")
    lines.append(f'{name}_q: none = qcompile.quantize.default(x, {scale}, {zero}, "{text}")')
    lines.append(f'{name}_d: none = qcompile.dequantize.default({name}_q, {scale}, {zero}, "{text}", torch.float32)')
    return lines, f"{name}_d"


def _config(name: str) -> Any:
    from transformers import GPT2Config, LlamaConfig, MixtralConfig, OPTConfig

    if name == "gpt2":
        return GPT2Config(vocab_size=VOCABULARY, n_embd=64, n_layer=1, n_head=4, n_positions=64)
    sizes: dict[str, int] = {"hidden_size": 64, "num_attention_heads": 4, "max_position_embeddings": 64}
    sizes["vocab_size"] = VOCABULARY
    if name == "opt":
        return OPTConfig(**sizes, num_hidden_layers=1, ffn_dim=128, word_embed_proj_dim=64, pad_token_id=None)
    if name == "mixtral":
        sizes |= {"intermediate_size": 64, "num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2}
        return MixtralConfig(**sizes, num_hidden_layers=1)
    return LlamaConfig(**sizes, intermediate_size=128, num_key_value_heads=2, num_hidden_layers=2)


@cache
def decoder(name: str) -> Program:
    """A tiny random decoder: llama, gpt2, opt or mixtral. Norms and biases are perturbed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config = _config(name)
    config._experts_implementation = "batched_mm"
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
            elif "embed" not in key and "wte" not in key:
                parameter.mul_(4)
    return capture(model)


def quantized(program: Program, weights: str, activations: str | None = None) -> Program:
    """A copy, rounded to nearest; static activations calibrated on random tokens."""
    program = program.clone()
    InsertQDQ(weights=weights, activations=activations).run(program)
    if activations is not None and "static" in activations:
        generator = torch.Generator().manual_seed(0)
        batches = [torch.randint(0, VOCABULARY, (2, 16), generator=generator) for _ in range(2)]
        Calibrate().run_calibrated(program, batches)
    RTN().run(program)
    return program


def prompt(batch: int = 2, length: int = 9) -> Tensor:
    """Random token ids ``[batch, length]``."""
    return torch.randint(0, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(3))


def error(ours: Tensor, reference: Tensor) -> float:
    """max |Δ| / max |reference|."""
    assert ours.shape == reference.shape
    return float((ours.double() - reference.double()).abs().max() / reference.double().abs().max())


def optimized(directory: Path) -> Counter[str]:
    """How often each operator is in the graph that onnxruntime makes of the model."""
    path = directory / "optimized.onnx"
    open_session(directory / "model.onnx", optimized=path)
    count = Counter(node.op_type for node in onnx.load(path, load_external_data=False).graph.node)
    path.unlink()
    return count
