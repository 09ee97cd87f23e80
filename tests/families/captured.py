"""Families as programs, and the inputs they are compared on."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from families.build import build
from families.table import CHUNK, FAMILIES, VOCABULARY
from qcompile.capture import capture
from qcompile.capture.dtypes import widen
from qcompile.ir.program import Program
from qcompile.ir.run import fill

SHAPES = ((3, 8), (1, 6))  # batch and length of the inputs that are compared: other than those of any trace


@dataclass(frozen=True)
class Captured:
    """A model and its program."""

    name: str
    model: Any
    program: Program


def capture_family(name: str) -> Captured:
    """The family's model, and its program, float64 throughout. Raises CaptureError for one that cannot be captured."""
    model: Any = build(name)
    kind = FAMILIES[name].example
    with _short_chunks(model):
        model = Crossed(model) if kind == "cross" else model
        program = capture(model) if kind == "ids" else capture(model, inputs_of(name, 2, 5))
    widen(program)
    return Captured(name, model, program)


class Crossed(nn.Module):
    """`forward(input_ids, encoder_hidden_states)` → the logits of a decoder that attends to them."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, encoder_hidden_states: Tensor) -> dict[str, Tensor]:
        out = self.model(input_ids, encoder_outputs=(encoder_hidden_states,), use_cache=False)
        return {"logits": out.logits}


@contextmanager
def _short_chunks(model: nn.Module) -> Iterator[None]:
    """While open, the gated delta rule of `model` runs in chunks of `CHUNK` tokens: its export unrolls a loop over the
    tokens of a chunk, which takes a minute at its own 64. The function is the same."""
    code: Any = sys.modules[type(model).__module__]
    rule = getattr(code, "torch_chunk_gated_delta_rule", None)
    if rule is None:
        yield
        return
    code.torch_chunk_gated_delta_rule = partial(rule, chunk_size=CHUNK)
    try:
        yield
    finally:
        code.torch_chunk_gated_delta_rule = rule


def inputs_of(name: str, batch: int, length: int, seed: int = 1) -> dict[str, Tensor]:
    """Random inputs by name; `length` counts tokens, images have the size of the configuration."""
    generator = torch.Generator().manual_seed(seed)
    kind = FAMILIES[name].example
    if kind == "image":
        size = 16 if FAMILIES[name].common else 24 + length
        return {"pixel_values": torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)}
    ids = torch.randint(3, VOCABULARY, (batch, length), generator=generator)
    if kind == "cross":
        states = torch.randn(batch, length + 2, 32, generator=generator, dtype=torch.float64)
        return {"input_ids": ids, "encoder_hidden_states": states}
    return {"input_ids": ids}


def theirs(model: Any, feeds: Mapping[str, Any]) -> Tensor:
    """The model's own logits, without any export: experts computed one by one, every float32 on the way float64."""
    if hasattr(model, "set_experts_implementation"):
        model.set_experts_implementation("eager")
    for module in model.modules():
        for name, buffer in module.named_buffers(recurse=False):
            if buffer.dtype is torch.float32:
                setattr(module, name, buffer.double())
    with torch.no_grad(), _Double():
        logits: Tensor = model(**feeds)["logits"]
    return logits


def norms(model: nn.Module, feeds: Mapping[str, Any]) -> int:
    """How often the model calls a module that normalises over the last axis, by the names of their classes."""
    called: list[str] = []
    handles = [
        module.register_forward_hook(lambda child, inputs, output: called.append(type(child).__name__))
        for module in model.modules()
        if type(module).__name__.endswith(("LayerNorm", "RMSNorm", "RMSNormGated", "L2Norm", "LayerNorm1P"))
    ]
    theirs(model, feeds)
    for handle in handles:
        handle.remove()
    return len(called)


class _Double(TorchFunctionMode):
    """While open, whatever names float32 gets float64."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = {name: _doubled(value) for name, value in (kwargs or {}).items()}
        return (Tensor.double if func is Tensor.float else func)(*map(_doubled, args), **named)


def _doubled(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value


def logits(program: Program, feeds: Mapping[str, Tensor]) -> Tensor:
    """The program's logits. With a cache, in two steps, the second on what the first left there: a pass may change how
    the cache spells keys and values, so it is never given from outside."""
    past = [node.name for node in program.inputs if node.name.startswith("past_key_values_")]
    if not past:
        return program.run(fill(program, feeds))["logits"]
    ids = feeds["input_ids"]
    first = ids.shape[1] // 2
    start = program.run(fill(program, {"input_ids": ids[:, :first]}))
    kept = {name: start[name.replace("past_key_values_", "present_")] for name in past}
    rest = program.run(fill(program, {"input_ids": ids[:, first:], **kept}))
    return torch.cat([start["logits"], rest["logits"]], 1)


def error(found: Tensor, wanted: Tensor) -> float:
    """max |Δ| / max |wanted|; inf where shapes differ or a value is not finite."""
    if found.shape != wanted.shape or not bool(found.isfinite().all()):
        return float("inf")
    return float((found.double() - wanted.double()).abs().max() / wanted.double().abs().max())
