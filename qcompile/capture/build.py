"""A transformers model without its weights: parameters are fake tensors, buffers are real.

Rotary tables and the like are buffers that the constructor computes, so they come out as the model means them.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

EXPERTS = "batched_mm"
"""How mixtures of experts are computed: gather and bmm, which have kernels for every dtype and an ONNX form."""


def build_fake(
    cls: type[PreTrainedModel], config: PretrainedConfig, dtype: torch.dtype, mode: FakeTensorMode
) -> PreTrainedModel:
    """`cls(config)` in eval mode; its weights are fakes of `mode`, tied as the configuration says."""
    from transformers import initialization

    config._experts_implementation = EXPERTS
    with _fake_parameters(mode), initialization.no_init_weights():
        model: PreTrainedModel = cls._from_config(config, dtype=dtype)
    return model.eval()


def tie(model: PreTrainedModel, target: str, source: str) -> None:
    """Make parameter `target` the very object `source` is."""
    parent, _, name = target.rpartition(".")
    tied = model.get_parameter(source)
    model.get_submodule(parent)._parameters[name] = tied


@contextmanager
def _fake_parameters(mode: FakeTensorMode) -> Iterator[None]:
    """While open, every parameter that a module registers is replaced by a fake of its shape and dtype."""
    register = torch.nn.Module.register_parameter

    def register_fake(self: torch.nn.Module, name: str, param: Any) -> None:
        register(self, name, param)
        if param is not None and not isinstance(param, FakeTensor):
            with mode:
                fake = torch.empty(param.shape, dtype=param.dtype)
                self._parameters[name] = torch.nn.Parameter(fake, requires_grad=False)

    torch.nn.Module.register_parameter = register_fake  # type: ignore[method-assign]
    try:
        yield
    finally:
        torch.nn.Module.register_parameter = register  # type: ignore[method-assign]
