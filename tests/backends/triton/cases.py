"""Cases for kernels: inputs from a seed, the launches of a plan run by whatever Triton is here, and a comparison.

In the interpreter (interpreted.py) tensors are on the CPU; on a GPU the same functions run there.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton.formats import format_of
from qcompile.backends.triton.launch import Config, JustInTime, dispatching
from qcompile.backends.triton.ops import attention as at
from qcompile.backends.triton.ops import experts as ex
from qcompile.backends.triton.ops import hadamard as hd
from qcompile.backends.triton.ops import quantize_rows as qr
from qcompile.backends.triton.ops import quantized_linear as ql
from qcompile.backends.triton.ops import scaled_linear as sl
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


def packed(spec: str, n: int, k: int, device: str = "cpu", layout: str = "tile") -> tuple[dict[str, Any], Tensor]:
    """A random weight in its format, as the operator takes it, and its values [n, k] by the numerics of the package."""
    quantized = QuantSpec.parse(spec).quantize(values((n, k), 1) + 0.1)
    found = format_of(quantized.spec, (n, k), tuple(quantized.scale.shape))
    assert not isinstance(found, str), found
    form = replace(found, layout=layout)
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
    return {**parts, "format": str(form)}, quantized.dequantize(torch.float32).to(device)


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


def run(planned: tuple[Any, Any]) -> Any:
    """Run the launches of a plan and return its results."""
    JustInTime().launch(planned[1])
    return planned[0]


def quantize_rows(
    spec: str, m: int, k: int, dtype: str = "float32", gain: bool = False, device: str = "cpu"
) -> dict[str, Any]:
    """Codes and scales against the numerics: the share of codes that differ, and by how much scales do."""
    x = values((m, k), 4, dtype, device) * 3
    x[0, : k // 2] = 0
    weight = values((k,), 5, dtype, device) if gain else None
    codes, scale = run(qr.plan(x, weight, 1e-5, spec))
    told_codes, told_scale = qr.reference(x, weight, 1e-5, spec)
    return {"differ": float((codes != told_codes).double().mean()), "error": error(scale, told_scale)}


def quantized_linear(
    weight: str,
    activation: str,
    m: int,
    n: int,
    k: int,
    config: list[int] | None = None,
    layout: str = "rows",
    bias: bool = False,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, Any]:
    """Quantized activations times quantized weights against both dequantized, in float64."""
    parts, expected_weight = packed(weight, n, k, device, layout)
    x = values((m, k), 2, "float32", device)
    codes, row_scale = qr.reference(x, None, 0.0, activation)
    expected = QuantSpec.parse(activation).quantize(x).dequantize()
    added = values((n,), 3, dtype, device) if bias else None
    operands = (
        codes,
        row_scale,
        parts["planes"],
        parts["scale"],
        parts["factor"],
        added,
        parts["format"],
        DTYPES[dtype],
    )
    chosen = None if config is None else Config(*config)
    with dispatching(JustInTime()):
        out, launches = ql.plan(*operands, config=chosen)
    JustInTime().launch(launches)
    exact = torch.nn.functional.linear(
        expected.double(), expected_weight.double(), None if added is None else added.double()
    )
    told = ql.reference(*operands)
    return {"error": error(out, exact), "reference": error(told, exact), "kernels": [one.kernel for one in launches]}


def quantize_scaled(element: str, m: int, k: int, dtype: str = "float32", device: str = "cpu") -> dict[str, Any]:
    """Codes and exponents against the numerics."""
    x = values((m, k), 6, dtype, device) * torch.logspace(-3, 3, k, device=device).to(DTYPES[dtype])
    x[0, :32] = 0
    codes, exponents = run(sl.plan_quantize(x, element))
    told_codes, told_exponents = sl.reference_quantize(x, element)
    same = torch.equal(exponents, told_exponents)
    return {"differ": float((codes != told_codes).double().mean()), "exponents": same}


def scaled_linear(
    weight: str,
    m: int,
    n: int,
    k: int,
    config: list[int] | None = None,
    bias: bool = False,
    emulate: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """Microscaling formats on both sides against both dequantized, in float64."""
    parts, expected_weight = packed(weight, n, k, device)
    element = parts["format"].split()[0]
    x = values((m, k), 2, "float32", device)
    codes, exponents = sl.reference_quantize(x, element)
    expected = QuantSpec.parse(sl.SPECS[element]).quantize(x).dequantize()
    added = values((n,), 3, "float32", device) if bias else None
    operands = (codes, exponents, parts["planes"], parts["scale"], added, parts["format"], torch.float32)
    with dispatching(JustInTime()):
        out, launches = sl.plan(*operands, config=None if config is None else Config(*config))
    if emulate is not None:
        launches[0] = replace(launches[0], constants={**launches[0].constants, "EMULATE": emulate})
    JustInTime().launch(launches)
    exact = torch.nn.functional.linear(
        expected.double(), expected_weight.double(), None if added is None else added.double()
    )
    return {"error": error(out, exact), "reference": error(sl.reference(*operands), exact)}


def hadamard(
    shape: list[int],
    order: int,
    block: int,
    inverse: bool = False,
    dtype: str = "float32",
    spec: str | None = None,
    device: str = "cpu",
) -> dict[str, Any]:
    """The transform against the package's; with `spec`, codes and scales of it."""
    x = values(tuple(shape), 7, dtype, device)
    if spec is None:
        return {"error": error(run(hd.plan(x, order, block, inverse)), hd.reference(x, order, block, inverse))}
    codes, scale = run(hd.plan_quantize(x, order, block, inverse, spec))
    told_codes, told_scale = hd.reference_quantize(x, order, block, inverse, spec)
    apart = (codes.to(torch.int16) - told_codes.to(torch.int16)).abs()
    return {"error": error(scale, told_scale), "differ": float((apart > 0).double().mean()), "apart": int(apart.max())}


def attention(
    batch: int,
    heads: int,
    groups: int,
    new: int,
    tokens: int,
    width: int,
    masked: bool = True,
    dtype: str = "float32",
    device: str = "cpu",
) -> dict[str, Any]:
    """Attention over codes against attention over the cache dequantized, in float64."""
    q = values((batch, heads, new, width), 8, dtype, device)
    spec = QuantSpec.parse("int8 sym token dynamic")
    cache = [spec.quantize(values((batch, groups, tokens, width), seed, "float32", device)) for seed in (9, 10)]
    mask = None
    if masked:
        seen = torch.arange(tokens)[None, :] <= torch.arange(tokens - new, tokens)[:, None]
        mask = seen.expand(batch, 1, new, tokens).clone().to(device)
        mask[0, :, :, :2] = False
    parts = (cache[0].codes, cache[0].scale, cache[1].codes, cache[1].scale, mask, 0.3)
    out = run(at.plan(q, *parts))
    key, value = (c.dequantize().double().repeat_interleave(heads // groups, 1) for c in cache)
    exact = torch.nn.functional.scaled_dot_product_attention(q.double(), key, value, mask, scale=0.3)
    return {"error": error(out, exact), "reference": error(at.reference(q, *parts), exact)}


def experts(
    spec: str, tokens: int, count: int, n: int, k: int, config: list[int] | None = None, device: str = "cpu"
) -> dict[str, Any]:
    """Tokens through packed experts against each token times its expert's values, in float64; one expert has none."""
    made = [packed(spec, n, k, device) for _ in range(count)]
    factors = torch.linspace(0.5, 1.5, count, device=device)
    for (parts, _), factor in zip(made, factors, strict=True):
        if parts["scale"].dtype != torch.uint8:
            parts["scale"] = parts["scale"] * factor
    whole = [made[0][1] * (f if made[0][0]["scale"].dtype != torch.uint8 else 1) for f in factors]
    stacked: dict[str, Any] = {
        name: None if made[0][0][name] is None else torch.stack([parts[name] for parts, _ in made])
        for name in ("scale", "zero", "factor")
    }
    planes = [torch.stack(same) for same in zip(*(parts["planes"] for parts, _ in made), strict=True)]
    x = values((tokens, k), 11, "float32", device)
    expert = torch.randint(0, max(1, count - 1), (tokens,), generator=torch.Generator().manual_seed(0)).to(device)
    operands = (x, expert, planes, *stacked.values(), made[0][0]["table"], made[0][0]["format"])
    with dispatching(JustInTime()):
        out, launches = ex.plan(*operands, config=None if config is None else Config(*config))
    JustInTime().launch(launches)
    exact = torch.stack([whole[int(e)].double() @ row.double() for e, row in zip(expert, x, strict=True)])
    return {"error": error(out, exact), "reference": error(ex.reference(*operands), exact)}
