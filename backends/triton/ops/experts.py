"""Each token through the packed weight of its expert.

    qcompile_triton::expert_linear(Tensor x, Tensor expert, Tensor[] planes, Tensor scale, Tensor? zero, Tensor? factor,
                                   Tensor? table, str format) -> Tensor

x [T, K]; expert int64 [T], which expert a token is for; planes, scale, zero and factor as `weight_only` takes them,
with an axis of experts in front; the result [T, N] in x's type.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qcompile.backends.triton.formats import WeightFormat
from qcompile.backends.triton.launch import (
    EXACT,
    Argument,
    Config,
    Constant,
    Launch,
    as_rows,
    bucket,
    ceil_div,
    dispatcher,
    only_shapes,
)
from qcompile.backends.triton.ops.registration import register, run
from qcompile.backends.triton.ops.weight_only import STEP_K, decoding, dequantize


def plan(
    x: Tensor,
    expert: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    table: Tensor | None,
    format: str,
    config: Config | None = None,
) -> tuple[Tensor, list[Launch]]:
    """The result and the launches that compute it, with `config` or what the dispatcher chooses."""
    form, count, outputs = WeightFormat.parse(format), planes[0].shape[0], planes[0].shape[2]
    out = x.new_empty((x.shape[0], outputs))
    if only_shapes(x):
        return out, []
    rows, tokens = as_rows(x, form.k), x.shape[0]
    if config is None:
        name = str(x.dtype).removeprefix("torch.")
        site = f"expert_linear {form} n={outputs} experts={count} {name} rows={bucket(tokens)}"
        config = dispatcher().choose(site, configs(form, tokens, count))
    order, starts, ends = sorted_by_expert(expert, count, config.block_m)
    none = planes[0]
    sizes = [plane[0].numel() for plane in planes]
    arguments: dict[str, Argument] = {
        **{"x": rows, "order": order, "starts": starts, "ends": ends, "plane0": planes[0]},
        **{"plane1": planes[1] if len(planes) > 1 else none, "scale": scale},
        **{"zero": none if zero is None else zero, "factor": none if factor is None else factor},
        **{"table": none if table is None else table, "out": out, "N": outputs, "K": form.k},
        **{"stride_x": rows.stride(0), "stride_scale": scale.shape[2]},
        **{"plane0_size": sizes[0], "plane1_size": sizes[-1] if len(sizes) > 1 else 0},
        **{"scale_size": scale[0].numel(), "runs": form.runs},
    }
    constants: dict[str, Constant] = {"EXPERTS": count, **decoding(form), "PRECISION": EXACT}
    constants |= {"BLOCK_E": max(2, 1 << (count - 1).bit_length()), "BLOCK_M": config.block_m}
    constants |= {"BLOCK_N": config.block_n, "BLOCK_K": form.block_k, "RUNS": config.runs}
    blocks = tokens // config.block_m + min(count, tokens)
    grid = (blocks, ceil_div(outputs, config.block_n), 1)
    return out, [Launch("experts.gemm", arguments, constants, grid, config)]


def configs(form: WeightFormat, tokens: int, experts: int) -> list[Config]:
    """The configurations for so many tokens, the one to take unmeasured first."""
    runs, few = min(STEP_K // form.block_k, 4), tokens <= 32 * experts
    shapes = [(16, 64, 4, 4), (16, 128, 4, 3)] if few else [(64, 128, 4, 3), (64, 64, 4, 3)]
    return [Config(m, n, w, s, 1, runs) for m, n, w, s in shapes]


def sorted_by_expert(expert: Tensor, count: int, block: int) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens in order of their expert, where each expert's begin, and the number of blocks up to each; nothing waits
    for the host."""
    order = torch.argsort(expert, stable=True).to(torch.int32)
    each = (expert[:, None] == torch.arange(count, device=expert.device)).sum(0)
    starts = torch.zeros(count + 1, dtype=torch.int32, device=expert.device)
    starts[1:] = each.cumsum(0)
    ends = ((each + block - 1) // block).cumsum(0).to(torch.int32)
    return order, starts, ends


def reference(
    x: Tensor,
    expert: Tensor,
    planes: Sequence[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    table: Tensor | None,
    format: str,
) -> Tensor:
    """The operator in plain torch: one expert dequantized at a time."""
    out = x.new_zeros((x.shape[0], planes[0].shape[2]))
    for index in range(planes[0].shape[0]):
        hit = (expert == index).nonzero()[:, 0]
        if not len(hit):
            continue
        own = [None if part is None else part[index] for part in (zero, factor)]
        weight = dequantize([plane[index] for plane in planes], scale[index], own[0], own[1], format, x.dtype)
        out[hit] = torch.nn.functional.linear(x[hit], weight)
    return out


def _expert_linear(
    x: Tensor,
    expert: Tensor,
    planes: list[Tensor],
    scale: Tensor,
    zero: Tensor | None,
    factor: Tensor | None,
    table: Tensor | None,
    format: str,
) -> Tensor:
    result: Tensor = run(plan, reference, x, expert, planes, scale, zero, factor, table, format)
    return result


EXPERT_LINEAR = register("expert_linear", _expert_linear, plan, reference)
