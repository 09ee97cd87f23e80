"""Cases for kernels: inputs from a seed, the launches of a plan run by whatever Triton is here, and a comparison.

In the interpreter (interpreted.py) tensors are on the CPU; on a GPU the same functions run there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton.formats import format_of
from qcompile.backends.triton.launch import Config, JustInTime, dispatching
from qcompile.backends.triton.ops import weight_only as wo
from qcompile.numerics import QuantSpec

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def error(found: Tensor, expected: Tensor) -> float:
    """max |Δ| / max |expected|; infinite where something is no number."""
    gap = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(torch.nan_to_num(gap, nan=float("inf")))


def values(shape: tuple[int, ...], seed: int, dtype: str = "float32", device: str = "cpu") -> Tensor:
    made = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    return made.to(device, DTYPES[dtype])


def packed(spec: str, n: int, k: int, device: str = "cpu") -> tuple[dict[str, Any], Tensor]:
    """A random weight in its format, as the operator takes it, and its values [n, k] by the numerics of the package."""
    quantized = QuantSpec.parse(spec).quantize(values((n, k), 1) + 0.1)
    form = format_of(quantized.spec, (n, k), tuple(quantized.scale.shape))
    assert not isinstance(form, str), form
    element = form.spec_element
    table = None if form.integer or form.half_float else element.decode(torch.arange(1 << form.bits).to(torch.uint8))
    zero, outer = quantized.zero_point, quantized.outer
    parts = {
        "planes": list(form.pack(quantized.codes)),
        "scale": quantized.scale.t().contiguous(),
        "zero": None if zero is None else zero.t().contiguous(),
        "factor": outer[0].reshape(1) if form.outer else None,
        "table": table,
    }
    for name, part in parts.items():
        if name == "scale" and form.scale != "float":
            part = part.view(torch.uint8)
        if name == "planes":
            parts[name] = [plane.to(device) for plane in part]
        else:
            parts[name] = None if part is None else part.to(device)
    return {**parts, "format": str(form)}, quantized.dequantize().to(device)


def weight_only(
    spec: str,
    m: int,
    n: int,
    k: int,
    config: list[int] | None = None,
    dtype: str = "float32",
    bias: bool = False,
    strided: bool = False,
    device: str = "cpu",
) -> dict[str, Any]:
    """The kernels against x · Wᵀ of values that the numerics dequantized; and the operator's CPU reference."""
    weight, expected_weight = packed(spec, n, k, device)
    x = values((m, k + 16), 2, dtype, device)[:, :k] if strided else values((m, k), 2, dtype, device)
    added = values((n,), 3, dtype, device) if bias else None
    chosen = None if config is None else Config(*config)
    with dispatching(JustInTime()):
        out, launches = wo.plan(x, bias=added, config=chosen, **weight)
        JustInTime().launch(launches)
    exact = torch.nn.functional.linear(x.double(), expected_weight.double(), None if added is None else added.double())
    told = wo.reference(x, bias=added, **weight)
    return {"error": error(out, exact), "reference": error(told, exact), "kernels": [one.kernel for one in launches]}
