"""Exporting a language model of transformers with its KV cache as inputs and outputs."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import Dim, ExportedProgram

from qcompile.capture.files import one_line
from qcompile.errors import CaptureError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

BATCH, SEQUENCE, PAST = 2, 3, 5  # example sizes; above 1, since torch.export fixes sizes of 0 and 1
LONG = 1031  # a second example, beyond the chunks that scans are cut into
_DYNAMIC = Dim.DYNAMIC

_check: Any = torch._check  # tells the tracer what holds, so that equal sizes share a symbol
KeyValue = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Exported:
    """An exported model with the public names of its inputs and outputs."""

    program: ExportedProgram
    inputs: list[str]
    outputs: list[str]


class _Cached(nn.Module):
    """A model run on a cache that is built from tensors and taken apart again.

    `entries` says for each layer of the cache which pair of `past` it holds, or None where it holds nothing.
    """

    def __init__(self, model: PreTrainedModel, entries: Sequence[int | None]) -> None:
        super().__init__()
        self.model = model
        self.entries = entries

    def run(
        self, input_ids: Tensor, attention_mask: Tensor, past: list[KeyValue], **positions: Tensor
    ) -> tuple[Tensor, list[KeyValue]]:
        """Logits, and the cache with the new tokens."""
        _same_sizes(input_ids, attention_mask, past)
        layers = self._layers(past)
        out = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            use_cache=True,
            **{_cache_name(self.model): _cache(layers)},
            **positions,
        )
        held = [layer for layer, entry in zip(layers, self.entries, strict=True) if entry is not None]
        return out.logits, [(layer.keys, layer.values) for layer in held]

    def _layers(self, past: list[KeyValue]) -> list[Any]:
        """Layers that hold everything, also where the model attends to a window: the mask leaves out what is older."""
        from transformers.cache_utils import DummyLayer, DynamicLayer

        layers: list[Any] = []
        for entry in self.entries:
            if entry is None:
                layers.append(DummyLayer())
                continue
            layer = DynamicLayer()
            layer.lazy_initialization(*past[entry])
            layer.keys, layer.values = past[entry]
            layers.append(layer)
        return layers


class Decoder(_Cached):
    """`forward(input_ids, attention_mask, position_ids, past)` → logits and the cache with the new tokens."""

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor, past: list[KeyValue]
    ) -> tuple[Tensor, list[KeyValue]]:
        return self.run(input_ids, attention_mask, past, position_ids=position_ids)


class PositionlessDecoder(_Cached):
    """`forward(input_ids, attention_mask, past)` → logits and the cache with the new tokens."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, past: list[KeyValue]) -> tuple[Tensor, list[KeyValue]]:
        return self.run(input_ids, attention_mask, past)


def _cache_name(model: PreTrainedModel) -> str:
    """What a model calls its cache: ``cache`` since transformers 5.24, which warns at the old name."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Headless(nn.Module):
    """`forward(input_ids, attention_mask[, position_ids])` → what the model returns, without a cache."""

    def __init__(self, model: PreTrainedModel, outputs: list[str]) -> None:
        super().__init__()
        self.model = model
        self.outputs = outputs
        self.options = {"use_cache": False} if "use_cache" in _parameters(model) else {}

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, position_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        _check(attention_mask.shape[0] == input_ids.shape[0])
        _check(attention_mask.shape[1] == input_ids.shape[1])
        if position_ids is not None:
            _check(position_ids.shape[0] == input_ids.shape[0])
            _check(position_ids.shape[1] == input_ids.shape[1])
        options: dict[str, Any] = dict(self.options)
        if position_ids is not None:
            options["position_ids"] = position_ids
        out = self.model(input_ids=input_ids, attention_mask=attention_mask, **options)
        named = {name: value for name, value in out.items() if isinstance(value, Tensor)}
        named = {"logits": named["logits"]} if "logits" in named else named
        self.outputs[:] = named
        return tuple(named.values())


def export_decoder(model: PreTrainedModel, mode: FakeTensorMode | None = None) -> Exported:
    """Export a causal LM with its cache; `mode` is the fake mode of its parameters, where they are fake.

    Raises CaptureError, saying why, for a model that has no such form.
    """
    positions = takes_positions(model)
    with mode or nullcontext():
        entries, pairs = _numbered(_cache_shapes(model))
        past = [tuple(torch.zeros(_sized(shape, PAST), dtype=dtype) for shape, dtype in pair) for pair in pairs]
        ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
        mask = torch.ones(BATCH, PAST + SEQUENCE, dtype=torch.int64)
        given = (torch.zeros_like(ids),) if positions else ()
    both, cached = {0: _DYNAMIC, 1: _DYNAMIC}, {0: _DYNAMIC, 2: _DYNAMIC}
    wrapped = Decoder(model, entries) if positions else PositionlessDecoder(model, entries)
    dynamic = (both, both, *(both for _ in given), [(cached, cached)] * len(past))
    program = _export(wrapped, (ids, mask, *given, past), dynamic)
    names = [f"{i}_{part}" for i in range(len(past)) for part in ("key", "value")]
    inputs = [*_head(positions), *(f"past_key_values_{name}" for name in names)]
    return Exported(program, inputs, ["logits", *(f"present_{name}" for name in names)])


def export_headless(model: PreTrainedModel, mode: FakeTensorMode | None = None) -> Exported:
    """Export any model of token ids without a cache.

    Raises CaptureError, saying why, where it does not export, or where the graph is one for some lengths only: chunked
    scans unroll their loop over the chunks of the example, which torch.export does not notice.
    """
    outputs: list[str] = []
    program = _headless(model, mode, outputs, SEQUENCE)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    longer = min(limit, LONG) if isinstance(limit, int) else LONG
    if longer > SEQUENCE and _calls(_headless(model, mode, [], longer)) != _calls(program):
        raise CaptureError(
            f"its graph for {SEQUENCE} tokens is not its graph for {longer}, so neither is right for all"
        )
    return Exported(program, _head(takes_positions(model)), outputs)


def _headless(model: PreTrainedModel, mode: FakeTensorMode | None, outputs: list[str], length: int) -> ExportedProgram:
    """Export on an example of `length` tokens; `outputs` receives the names of what is returned."""
    with mode or nullcontext():
        ids = torch.zeros(BATCH, length, dtype=torch.int64)
        args = (ids, torch.ones_like(ids), *((torch.zeros_like(ids),) if takes_positions(model) else ()))
    return _export(Headless(model, outputs), args, ({0: _DYNAMIC, 1: _DYNAMIC},) * len(args))


def _calls(program: ExportedProgram) -> list[str]:
    """Every call with its arguments; sizes that torch.export keeps symbolic are arguments by name."""
    return [f"{node.target}{node.args}{node.kwargs}" for node in program.graph.nodes if node.op == "call_function"]


def _head(positions: bool) -> list[str]:
    return ["input_ids", "attention_mask", *(["position_ids"] if positions else [])]


def takes_positions(model: PreTrainedModel) -> bool:
    """Whether positions that count from 0 are an input. Not where the model derives them from the padding id
    (RoBERTa and its kin begin after it), nor where it has none to give (ALiBi, recurrence)."""
    derives = any(hasattr(module, "create_position_ids_from_input_ids") for module in model.modules())
    return "position_ids" in _parameters(model) and not derives


def _parameters(model: PreTrainedModel) -> set[str]:
    return set(inspect.signature(model.forward).parameters)


def _export(module: nn.Module, args: tuple[Any, ...], dynamic: Any) -> ExportedProgram:
    with torch.no_grad():
        try:
            return torch.export.export(module.eval(), args, dynamic_shapes=dynamic, strict=False)
        except Exception as error:  # torch.export lets through whatever the model's code raises
            raise CaptureError(f"torch.export refuses it ({type(error).__name__}: {one_line(error)})") from error


def _same_sizes(input_ids: Tensor, attention_mask: Tensor, past: list[KeyValue]) -> None:
    """One batch, one sequence and one past length for all inputs, so that the graph has three symbols."""
    batch, sequence = input_ids.shape
    length = past[0][0].shape[2]
    _check(attention_mask.shape[1] == length + sequence)
    _check(attention_mask.shape[0] == batch)
    for tensor in (t for pair in past for t in pair):
        _check(tensor.shape[2] == length)
        _check(tensor.shape[0] == batch)


def _cache(layers: list[Any]) -> Any:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.layers = layers
    return cache


Shape = tuple[tuple[int, ...], torch.dtype]


def _cache_shapes(model: PreTrainedModel) -> list[tuple[Shape, Shape] | None]:
    """Shape and dtype of each cache layer's keys and values, from a forward pass; None for a layer that holds none."""
    from transformers import DynamicCache
    from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

    ids = torch.zeros(BATCH, SEQUENCE, dtype=torch.int64)
    try:
        with torch.no_grad():
            out = model(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        cache = getattr(out, _cache_name(model))
    except Exception as error:  # whatever the model's code raises
        raise CaptureError(f"it does not run with a cache ({type(error).__name__}: {one_line(error)})") from error
    cache = getattr(cache, "self_attention_cache", cache)
    if cache is None:
        raise CaptureError("it keeps no keys and values")
    if not isinstance(cache, DynamicCache):
        raise CaptureError(f"its state is a {type(cache).__name__}, not keys and values")
    shapes: list[tuple[Shape, Shape] | None] = []
    for layer in cache.layers:
        if type(layer) is DummyLayer:
            shapes.append(None)
        elif type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) and layer.is_initialized:
            k, v = layer.keys, layer.values
            shapes.append(((tuple(k.shape), k.dtype), (tuple(v.shape), v.dtype)))
        else:
            raise CaptureError(f"a layer's state is a {type(layer).__name__}, not keys and values")
    if not any(shapes):
        raise CaptureError("it keeps no keys and values")
    return shapes


def _numbered(
    shapes: list[tuple[Shape, Shape] | None],
) -> tuple[list[int | None], list[tuple[Shape, Shape]]]:
    pairs = [shape for shape in shapes if shape is not None]
    numbers: Iterator[int] = iter(range(len(pairs)))
    return [None if shape is None else next(numbers) for shape in shapes], pairs


def _sized(shape: tuple[int, ...], length: int) -> tuple[int, ...]:
    return (*shape[:2], length, *shape[3:])


@contextmanager
def experts_and_mode(model: PreTrainedModel, experts: str) -> Iterator[None]:
    """Put `model` in eval mode with `experts` as its implementation of experts, and back afterwards."""
    training = {module: module.training for module in model.modules()}
    before = model.get_experts_implementation()
    model.eval()
    model.set_experts_implementation(experts)
    try:
        yield
    finally:
        model.set_experts_implementation(before)
        for module, mode in training.items():
            module.training = mode
