"""Which tensors of a checkpoint make which weight of the model, without reading any.

transformers renames checkpoint tensors and converts some (per-expert matrices into one 3-D parameter, a fused qkv into
three, …) by tables of patterns and operations. Here the same tables are resolved once, by name; a conversion is tried
on fake tensors to learn its results' shapes, and runs on real ones each time a weight is read.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from qcompile.capture.build import tie
from qcompile.errors import CaptureError
from qcompile.ir.weights import ShardSource, TensorSource, WeightStore

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class NotLazy(Exception):
    """The checkpoint cannot be resolved without reading it."""


@dataclass(eq=False)
class Conversion:
    """Checkpoint tensors that one conversion of transformers turns into one or several weights.

    `parts` lists (pattern the name matched, name in the checkpoint, where it is), in the order transformers collects.
    """

    converter: Any
    target: str
    model: PreTrainedModel
    dtype: torch.dtype
    parts: list[tuple[str, str, ShardSource]] = field(default_factory=list)

    def run(self, read: Callable[[ShardSource], Tensor]) -> dict[str, Tensor]:
        """Weight name → tensor, the parts coming from `read`."""
        converter = copy.deepcopy(self.converter)
        for pattern, name, source in self.parts:
            converter.add_tensor(self.target, name, pattern, _reader(read, source))
        with torch.no_grad():
            made = converter.convert(self.target, model=self.model, config=self.model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def read(self, source: ShardSource) -> Tensor:
        """One part, in the model's dtype: transformers converts after the cast, which matters to arithmetic."""
        tensor = source.read()
        return tensor.to(self.dtype) if tensor.is_floating_point() else tensor


def _reader(read: Callable[[ShardSource], Tensor], source: ShardSource) -> Callable[[], Tensor]:
    return lambda: read(source)


@dataclass(frozen=True)
class ConvertedSource:
    """One result of a conversion; reading it reads the parts and converts them."""

    conversion: Conversion
    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype

    def read(self) -> Tensor:
        return self.conversion.run(self.conversion.read)[self.name].contiguous()


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint resolved against a model: `sources` by weight name, and the checkpoint tensors nothing reads."""

    sources: dict[str, TensorSource]
    unused: list[str]


def resolve(model: PreTrainedModel, tensors: Mapping[str, ShardSource], mode: FakeTensorMode) -> Checkpoint:
    """Find the source of every weight of `model` (whose parameters are fakes of `mode`).

    Raises NotLazy where a conversion does not run on fake tensors.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms = get_model_conversion_mapping(model)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, TensorSource] = {}
    conversions: dict[str, Conversion] = {}
    unused = []
    for name in sorted(tensors, key=dot_natural_key):
        key, pattern = rename_source_key(name, renamings, converters, prefix, state)
        if key not in state and name in state:  # a name that is right already
            key, pattern = rename_source_key(name, [], [], prefix, state)
        if key not in state:
            unused.append(name)
        elif pattern is None:
            sources[key] = tensors[name]
        else:
            made = Conversion(by_pattern[pattern], key, model, state[key].dtype)
            conversions.setdefault(key, made).parts.append((pattern, name, tensors[name]))
    for conversion in conversions.values():
        sources.update(_converted(conversion, mode))
    return Checkpoint(sources, unused)


def _converted(conversion: Conversion, mode: FakeTensorMode) -> dict[str, TensorSource]:
    def fake(source: ShardSource) -> Tensor:
        return torch.empty(source.shape, dtype=conversion.dtype if source.dtype.is_floating_point else source.dtype)

    try:
        with mode:
            made = conversion.run(fake)
    except Exception as error:  # an operation may need values: that is what the fallback is for
        raise NotLazy(f"{conversion.converter} does not run on fake tensors") from error
    return {
        name: ConvertedSource(conversion, name, tuple(tensor.shape), tensor.dtype)
        for name, tensor in made.items()
        if isinstance(tensor, Tensor)
    }


def bind(model: PreTrainedModel, checkpoint: Checkpoint, notes: list[str]) -> WeightStore:
    """A store that reads each weight of `model` from the checkpoint, cast to the dtype the model has it in.

    Tied parameters of `model` become one object, and one weight of the store. Appends to `notes` what a user should
    know.

    Raises CaptureError for a weight whose shape is not the one that config.json asks for.
    """
    store, state = WeightStore(), model.state_dict()
    for key, source in checkpoint.sources.items():
        if key not in state:
            continue
        wanted = state[key]
        if tuple(source.shape) != tuple(wanted.shape):
            raise CaptureError(
                f"weight {key!r} is {list(source.shape)} in the checkpoint, config.json asks for {list(wanted.shape)}; "
                "they do not belong together"
            )
        _bind(store, key, source, wanted.dtype)
    _tie(model, store, checkpoint.sources, notes)
    if checkpoint.unused:
        more = f" and {len(checkpoint.unused) - 1} more" if len(checkpoint.unused) > 1 else ""
        notes.append(f"the checkpoint's tensor {checkpoint.unused[0]!r}{more} is no part of {type(model).__name__}")
    return store


def missing(model: PreTrainedModel, store: WeightStore, read: set[str]) -> list[str]:
    """Parameters among `read` that the checkpoint lacks, beside those the model says may be absent."""
    optional = [re.compile(p) for p in getattr(model, "_keys_to_ignore_on_load_missing", None) or ()]
    names = [n for n, _ in model.named_parameters(remove_duplicate=False) if n in read and n not in store]
    return [n for n in names if not any(p.search(n) for p in optional)]


def _bind(store: WeightStore, key: str, source: TensorSource, dtype: torch.dtype) -> None:
    store.bind(key, source)
    if source.dtype != dtype:
        store.edit(key, lambda tensor: tensor.to(dtype), dtype=dtype)


def _tie(model: PreTrainedModel, store: WeightStore, sources: Mapping[str, TensorSource], notes: list[str]) -> None:
    """Tie what the configuration ties, unless the checkpoint has both and they differ (as transformers does).

    Each of the tied names is bound, since torch.export reports one tensor under whichever it meets first.
    """
    tied: Mapping[str, str] = getattr(model, "all_tied_weights_keys", None) or {}
    for target, source in tied.items():
        try:
            parameter = model.get_parameter(source)
            model.get_parameter(target)
        except AttributeError:  # a buffer, or a module this model lacks
            continue
        if target in store and source in store:
            if not torch.equal(store[target], store[source]):
                notes.append(f"config.json ties {target} to {source}, the checkpoint has two that differ: not tied")
                continue
        elif source in store:
            _bind(store, target, sources[source], parameter.dtype)
        elif target in store:
            _bind(store, source, sources[target], parameter.dtype)
        tie(model, target, source)
