"""Making a family's operator: a `torch.library.triton_op` that runs its plan, with a CPU kernel and a fake of
shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile.backends.triton.launch import Launch, Plan, dispatcher
from qcompile.errors import LoweringError

NAMESPACE = "qcompile_triton"
LARGEST = 2**31 - 1
"""Elements of a tensor that kernels, which count with 32 bits, can reach."""
PLANS: dict[Any, Plan] = {}
"""Operator → its plan: what lowering asks which kernels a graph needs, with tensors that have no storage."""


def register(name: str, function: Callable[..., Any], plan: Plan, reference: Callable[..., Any]) -> Any:
    """Register `qcompile_triton::name`.

    Args:
        function: the operator with typed arguments, whose schema it is; its body runs the plan.
        plan: see `Plan`; takes tensors of any device, `meta` included.
        reference: the same results from plain torch operators.
    """
    op: Any = torch.library.triton_op(f"{NAMESPACE}::{name}", function, mutates_args=())
    op.register_kernel("cpu")(reference)
    op.register_fake(lambda *args, **kwargs: plan(*args, **kwargs)[0])
    overload = getattr(getattr(torch.ops, NAMESPACE), name).default
    PLANS[overload] = plan
    return overload


def run(plan: Plan, reference: Callable[..., Any], *arguments: Any) -> Any:
    """An operator's body: launch what is planned and return the results.

    On a CPU it is only run where a compiler traces it: then it is the reference, which becomes part of what is
    compiled.

    Raises LoweringError where a compiler traces it on a GPU with sizes that are symbols: how many programs are
    launched, and of which configuration, depends on them.
    """
    tensor = next(a for a in arguments if isinstance(a, torch.Tensor))
    if tensor.device.type == "cpu":
        return reference(*arguments)
    result, launches = plan(*arguments)
    if not launches and any(not isinstance(size, int) for size in tensor.shape):
        raise LoweringError("kernels cannot be traced for sizes that vary; compile with dynamic=False")
    for launch in launches:
        check_sizes(launch)
    dispatcher().launch(launches)
    return result


def check_sizes(launch: Launch) -> None:
    """Raise LoweringError for a tensor with more elements than 32 bits count: kernels would read elsewhere."""
    for name, value in launch.arguments.items():
        if isinstance(value, torch.Tensor) and value.numel() > LARGEST:
            raise LoweringError(
                f"{launch.kernel}: {name} has {value.numel()} elements, kernels count to {LARGEST}; use a smaller "
                "batch or a shorter prompt"
            )
