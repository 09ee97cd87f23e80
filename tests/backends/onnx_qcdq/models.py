"""Programs for the tests: one product, and tiny random decoders captured with their cache, quantized by hand."""

from __future__ import annotations

import fnmatch
import operator
from typing import Any

import torch
from torch import Tensor, fx, nn

import qcompile.ops  # noqa: F401
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec

aten = torch.ops.aten
_SHORT = {torch.int8: "i8", torch.uint8: "u8", torch.float32: "f32", torch.float16: "f16", torch.bfloat16: "bf16"}


def declare(name: str, key: str, tensor: Tensor) -> str:
    """A weight parameter of the IR text."""
    shape = ", ".join(map(str, tensor.shape)) or "()"
    return f'{name}: {_SHORT[tensor.dtype]}[{shape}] = "{key}"'


def parse(body: str, weights: dict[str, Tensor], inputs: str, names: dict[str, str] | None = None) -> Program:
    """A program from lines of IR text; weights are called by `names` (key → name), else by their key."""
    declared = ", ".join(declare((names or {}).get(key, key), key, tensor) for key, tensor in weights.items())
    lines = "\n".join(f"    {line.strip()}" for line in body.strip().splitlines())
    return Program.parse(f"def main({inputs}, *, {declared}):\n{lines}", weights)


def store(program: Program, node: fx.Node, spec: QuantSpec) -> fx.Node:
    """Replace a weight by stored codes, scale and zero-point, and the call that dequantizes them."""
    key = program.key(node)
    quantized = spec.quantize(program.weights[key])
    parts: list[fx.Node | None] = [program.add_weight(f"{key}.codes", quantized.codes)]
    parts.append(program.add_weight(f"{key}.scale", quantized.scale))
    zero = quantized.zero_point
    parts.append(None if zero is None else program.add_weight(f"{key}.zero_point", zero))
    first = min(node.users, key=list(program.graph.nodes).index)
    args = (*parts, str(spec), node.meta["val"].dtype)
    value = program.call(torch.ops.qcompile.dequantize.default, args, before=first, module=program.module_of(node))
    node.replace_all_uses_with(value)
    return value


def quantize_weights(program: Program, spec: str, pattern: str = "*_proj*.weight") -> int:
    """Round the weights whose name matches; returns how many."""
    nodes = [n for n in program.weight_nodes if fnmatch.fnmatch(program.key(n), pattern)]
    for node in nodes:
        store(program, node, QuantSpec.parse(spec))
    program.refresh()
    return len(nodes)


def quantize_input(program: Program, node: fx.Node, name: str, spec: str, calibration: Tensor | None = None) -> None:
    """Quantize and dequantize what a call reads as its argument `name`, with stored parameters if calibrated."""
    parsed, x = QuantSpec.parse(spec), program.arg(node, name)
    scale: Any
    zero: Any
    if calibration is None:
        chosen = program.call(torch.ops.qcompile.choose_qparams.default, (x, spec), before=node)
        scale = program.call(operator.getitem, (chosen, 0), before=node)
        zero = None if parsed.symmetric else program.call(operator.getitem, (chosen, 1), before=node)
    else:
        from qcompile.numerics.params import choose_qparams

        numbers = choose_qparams(calibration, parsed)
        key = f"{program.module_of(node) or node.name}.input"
        scale = program.add_weight(f"{key}.scale", numbers[0])
        zero = None if numbers[1] is None else program.add_weight(f"{key}.zero_point", numbers[1])
    codes = program.call(torch.ops.qcompile.quantize.default, (x, scale, zero, spec), before=node)
    args = (codes, scale, zero, spec, x.meta["val"].dtype)
    program.set_arg(node, name, program.call(torch.ops.qcompile.dequantize.default, args, before=node))


def quantize_activations(program: Program, spec: str, feeds: dict[str, Tensor] | None = None) -> None:
    """Quantize the inputs of every linear whose weight is quantized; statically if `feeds` to calibrate with are given."""
    linears = [
        n for n in program.calls(aten.linear.default) if n.args[1].target is torch.ops.qcompile.dequantize.default
    ]
    seen: dict[str, Tensor] = {}
    if feeds is not None:
        probe = program.clone()
        inputs = {n.args[0].name for n in linears}
        nodes = [n for n in probe.nodes if n.name in inputs]
        probe.output_node.args = (tuple(nodes),)
        probe.output_names = tuple(n.name for n in nodes)
        seen = probe.run(feeds)
    for node in linears:
        quantize_input(program, node, "input", spec, seen.get(node.args[0].name))
    program.refresh()


class Decoder(nn.Module):
    """A causal language model with its cache as inputs and outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, **past: Tensor) -> Any:
        from transformers import DynamicCache

        cache, tensors = DynamicCache(), list(past.values())
        first = tensors[0]
        for layer in range(len(tensors) // 2):
            key, value = tensors[2 * layer], tensors[2 * layer + 1]
            for tensor in (key, value):
                torch._check(tensor.shape[2] == first.shape[2])
                torch._check(tensor.shape[0] == input_ids.shape[0])
            cache.update(key, value, layer)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=cache,
            use_cache=True,
        )
        result = {"logits": out.logits}
        for index, layer_cache in enumerate(cache.layers):
            result |= {f"present_{index}_key": layer_cache.keys, f"present_{index}_value": layer_cache.values}
        return result


def capture(config: Any) -> Program:
    """A randomly initialised causal language model (seed 0) as a program; norms and biases are perturbed."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    config._attn_implementation, config._experts_implementation = "sdpa", "batched_mm"
    model = AutoModelForCausalLM.from_config(config).eval()
    for name, parameter in model.named_parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
        elif "embed" not in name:
            parameter.data.mul_(4)
    layers, heads = config.num_hidden_layers, getattr(config, "num_key_value_heads", config.num_attention_heads)
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    past = {
        f"past_key_values_{i}_{part}": torch.zeros(2, heads, 5, width) for i in range(layers) for part in ("key", "value")
    }
    ids = torch.zeros(2, 3, dtype=torch.long)
    args = (ids, torch.ones(2, 8, dtype=torch.long), ids)
    dynamic = torch.export.Dim.DYNAMIC
    both, cache = {0: dynamic, 1: dynamic}, {0: dynamic, 2: dynamic}
    shapes = {"input_ids": both, "attention_mask": both, "position_ids": both, "past": {name: cache for name in past}}
    with torch.no_grad():
        exported = torch.export.export(Decoder(model), args, past, dynamic_shapes=shapes, strict=False)
    program = Program.from_exported(exported, strip="model.")
    program.info = {
        "model_type": config.model_type,
        "config": config.to_dict(),
        "vocab_size": config.vocab_size,
        "max_positions": 64,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return program


def llama(layers: int = 2) -> Program:
    from transformers import LlamaConfig

    return capture(
        LlamaConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2() -> Program:
    from transformers import GPT2Config

    return capture(GPT2Config(vocab_size=96, n_embd=64, n_layer=2, n_head=4, n_positions=64, bos_token_id=1, eos_token_id=2))


def mixtral() -> Program:
    from transformers import MixtralConfig

    return capture(
        MixtralConfig(
            vocab_size=96,
            hidden_size=64,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_local_experts=4,
            num_experts_per_tok=2,
            max_position_embeddings=64,
        )
    )
