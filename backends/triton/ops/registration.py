"""Making a family's operator: a `torch.library.triton_op` that runs its plan, with a CPU kernel and a fake of
shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile.backends.triton.launch import Plan, dispatcher

NAMESPACE = "qcompile_triton"
PLANS: dict[Any, Plan] = {}
"""Operator → its plan: what lowering asks which kernels a graph needs, with tensors that have no storage."""


def register(name: str, function: Callable[..., Any], plan: Plan, reference: Callable[..., Any]) -> Any:
    """Register `qcompile_triton::name`.

    Args:
        function: the operator with typed arguments, whose schema it is; its body runs the plan.
        plan: see `Plan`; takes tensors of any device, `meta` included.
        reference: the same results from plain torch operators.
    """
    op = torch.library.triton_op(f"{NAMESPACE}::{name}", function, mutates_args=())
    op.register_kernel("cpu")(reference)
    op.register_fake(lambda *args, **kwargs: plan(*args, **kwargs)[0])
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    PLANS[overload] = plan
    return overload


def run(planned: tuple[Any, Any]) -> Any:
    """Launch what was planned and return the results."""
    result, launches = planned
    dispatcher().launch(launches)
    return result
