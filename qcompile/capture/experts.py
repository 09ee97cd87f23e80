"""Experts of models that transformers computes in a loop over those that a token chose, which no export can follow.

    for e in experts that were chosen: y[tokens of e] += p · f(x[tokens of e]; W[e])
        ⟶   y = Σ over the k choices of a token: p · f(x; W[choice]),  by gather and bmm

Exact in real arithmetic; the form in which transformers computes the experts of other models when they are exported.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn


def dbrx(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """What `DbrxExperts` computes: hidden states ``[batch, sequence, hidden]``, choices ``[tokens, k]``."""
    hidden, inner, choices = experts.hidden_size, experts.ffn_hidden_size, top_k_index.shape[-1]
    chosen = top_k_index.reshape(-1)
    gate, up, down = (
        weight.view(experts.num_experts, inner, hidden)[chosen]
        for weight in (experts.mlp.w1, experts.mlp.v1, experts.mlp.w2)
    )
    x = hidden_states.reshape(-1, hidden).repeat_interleave(choices, dim=0).unsqueeze(-1)
    inside = experts.mlp.activation_fn(torch.bmm(gate, x).squeeze(-1)) * torch.bmm(up, x).squeeze(-1)
    each = torch.bmm(inside.unsqueeze(1), down).squeeze(1) * top_k_weights.reshape(-1).unsqueeze(-1)
    return each.view(-1, choices, hidden).sum(dim=1).view(hidden_states.shape)


LOOPED: dict[str, Callable[..., Tensor]] = {"DbrxExperts": dbrx}
"""Name of a module's class → its forward without the loop, given the module first."""


@contextmanager
def without_loops(model: nn.Module) -> Iterator[None]:
    """While open, modules of `model` whose class is in `LOOPED` compute without a loop."""
    looped = [module for module in model.modules() if type(module).__name__ in LOOPED]
    for module in looped:
        module.__dict__["forward"] = partial(LOOPED[type(module).__name__], module)
    try:
        yield
    finally:
        for module in looped:
            del module.__dict__["forward"]
