"""Making a family's model: random with a seed, in float64, with nothing left at a value that hides errors."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from families.table import COMMON, FAMILIES

_EPS = ("eps", "variance_epsilon", "norm_eps", "layer_norm_epsilon", "epsilon", "rms_norm_eps")


def build(name: str, seed: int = 0) -> Any:
    """The family's model in float64 and eval mode. Norms have gains away from 1, biases away from 0, eps of their own."""
    import transformers

    family = FAMILIES[name]
    options = {**COMMON, **family.config} if family.common else dict(family.config)
    options = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0} | options
    config = transformers.AutoConfig.for_model(family.model_type or name, **options)
    torch.manual_seed(seed)
    model = getattr(transformers, family.auto).from_config(config, dtype=torch.float64).eval()
    perturb(model, seed)
    return model


def perturb(model: nn.Module, seed: int) -> None:
    """Draw weights that pass on their input's size; move vectors away from 1 and 0, and each eps from all others."""
    generator = torch.Generator().manual_seed(seed)

    def noise(tensor: torch.Tensor) -> torch.Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64).to(tensor.dtype)

    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.copy_(noise(parameter) * (parameter[0].numel() if parameter.ndim == 2 else 32) ** -0.5)
            else:
                parameter.add_(noise(parameter), alpha=0.3)
        for key, buffer in model.named_buffers():
            if key.endswith(("running_var", "layer_scalar")):
                buffer.mul_((0.3 * noise(buffer)).exp())
            elif key.endswith(("running_mean", "e_score_correction_bias")):
                buffer.add_(noise(buffer), alpha=0.3)
    for number, module in enumerate(model.modules()):
        for attribute in _EPS:
            if isinstance(getattr(module, attribute, None), float):
                setattr(module, attribute, 1e-3 * (1 + number / 16))
