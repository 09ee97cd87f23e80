"""The online Hadamard transform by a kernel, alone or with the codes of its result.

    qcompile_triton::hadamard(Tensor x, int order, int block, bool inverse) -> Tensor
    qcompile_triton::hadamard_quantize(Tensor x, int order, int block, bool inverse, str spec) -> (Tensor, Tensor)

As `qcompile::hadamard`: the last axis of x in runs of `block`, each times the matrix of `order` and a Sylvester matrix.
The second one wants a run to be a row (block = K) and a `spec` with one scale a token; it gives codes of x's shape and
scales float32 [..., 1].
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from qcompile.backends.triton.launch import EXACT, Argument, Config, Constant, Launch, ceil_div, only_shapes
from qcompile.backends.triton.ops.quantize_rows import reference as quantize_reference
from qcompile.backends.triton.ops.quantize_rows import rounding
from qcompile.backends.triton.ops.registration import register, run
from qcompile.hadamard.construct import hadamard as base_matrix
from qcompile.hadamard.construct import kronecker
from qcompile.hadamard.op import HADAMARD
from qcompile.ops import parse_spec

DENSE, WIDEST = 128, 256
"""Runs up to DENSE are one product; the factors of wider ones have up to WIDEST rows."""


def factors(order: int, block: int) -> tuple[int, int] | None:
    """(a, b) with a * b = block: the sizes of the two matrices a run is multiplied by; None where one is too large.

    >>> factors(1, 64), factors(1, 4096), factors(28, 14336), factors(1, 1 << 17)
    ((1, 64), (64, 64), (112, 128), None)
    """
    if block <= DENSE:
        return 1, block
    sylvester = block // order
    b = 1
    while b < sylvester and b < 128 and b * b < block:
        b *= 2
    return (block // b, b) if block // b <= WIDEST and b > 1 else None


@lru_cache(maxsize=64)
def matrices(order: int, block: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """A [a, a] and Bᵀ [b, b] of ±1, or for the inverse their transposes."""
    split = factors(order, block)
    assert split is not None
    (a, b), sylvester = split, block // order
    if a == 1:
        left, right = torch.ones(1, 1, dtype=torch.int8), kronecker([base_matrix(order), base_matrix(sylvester)])
    else:
        left, right = kronecker([base_matrix(order), base_matrix(sylvester // b)]), base_matrix(b)
    if device.type == "meta":
        return torch.empty(a, a, dtype=dtype, device=device), torch.empty(b, b, dtype=dtype, device=device)
    left, right = (left.T, right) if inverse else (left, right.T)
    return left.to(device, dtype).contiguous(), right.to(device, dtype).contiguous()


def plan(x: Tensor, order: int, block: int, inverse: bool) -> tuple[Tensor, list[Launch]]:
    """The result and the launch that computes it."""
    out = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    if only_shapes(x):
        return out, []
    nothing: dict[str, Constant] = {"KIND": "none", "DIVISOR": 1.0, "LOWEST": 0, "HIGHEST": 0, "FLOOR": 0.0}
    return out, [_launch(x, order, block, inverse, out, out, nothing)]


def plan_quantize(
    x: Tensor, order: int, block: int, inverse: bool, spec: str
) -> tuple[tuple[Tensor, Tensor], list[Launch]]:
    """Codes, scales, and the launch that computes them."""
    parsed = parse_spec(spec)
    codes = torch.empty(x.shape, dtype=parsed.storage, device=x.device)
    scales = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
    if only_shapes(x):
        return (codes, scales), []
    return (codes, scales), [_launch(x, order, block, inverse, codes, scales, rounding(parsed))]


def _launch(
    x: Tensor, order: int, block: int, inverse: bool, out: Tensor, scales: Tensor, kind: dict[str, Constant]
) -> Launch:
    split = factors(order, block)
    assert split is not None
    (a, b), runs = split, x.numel() // block
    left, right = matrices(order, block, inverse, x.dtype, x.device)
    padded = [1 << max(4, (size - 1).bit_length()) for size in (a, b)]
    rows = 16 if runs <= 1024 else 64
    arguments: dict[str, Argument] = {
        "x": x.contiguous(),
        "left": left,
        "right": right,
        "out": out,
        "scales": scales,
        "R": runs,
    }
    constants: dict[str, Constant] = {
        **{"A_SIZE": a, "B_SIZE": b, "A": padded[0], "B": padded[1], "FACTOR": 1 / math.sqrt(block)},
        **{"BLOCK_R": rows, "PRECISION": EXACT},
        **kind,
    }
    config = Config(rows if a == 1 else padded[0], padded[1], 8 if padded[0] * padded[1] >= 8192 else 4, 1)
    return Launch("hadamard.transform", arguments, constants, (ceil_div(runs, rows) if a == 1 else runs, 1, 1), config)


def reference(x: Tensor, order: int, block: int, inverse: bool) -> Tensor:
    """The operator in plain torch."""
    result: Tensor = HADAMARD(x, order, block, inverse)
    return result


def reference_quantize(x: Tensor, order: int, block: int, inverse: bool, spec: str) -> tuple[Tensor, Tensor]:
    """The operator in plain torch."""
    return quantize_reference(reference(x, order, block, inverse), None, 0.0, spec)


def _hadamard(x: Tensor, order: int, block: int, inverse: bool) -> Tensor:
    result: Tensor = run(plan, reference, x, order, block, inverse)
    return result


def _hadamard_quantize(x: Tensor, order: int, block: int, inverse: bool, spec: str) -> tuple[Tensor, Tensor]:
    result: tuple[Tensor, Tensor] = run(plan_quantize, reference_quantize, x, order, block, inverse, spec)
    return result


TRANSFORM = register("hadamard", _hadamard, plan, reference)
TRANSFORM_QUANTIZE = register("hadamard_quantize", _hadamard_quantize, plan_quantize, reference_quantize)
