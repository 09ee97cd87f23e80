"""The Triton kernels on the shapes of an 8B Llama: with a GPU, times beside the roofline and beside other libraries;
without one, what each configuration uses of every GPU it is compiled for.

    python benchmarks/triton_kernels.py --write                            with a GPU: some five minutes
    python benchmarks/triton_kernels.py --write --gpu sm_90,gfx942         without one: compiles for these (default:
    six)
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from common import publish
from torch import Tensor

from qcompile.backends.triton.aot import compile_variant
from qcompile.backends.triton.enumerate_launches import planned
from qcompile.backends.triton.formats import WeightFormat, format_of
from qcompile.backends.triton.ops import (
    attention,
    experts,
    hadamard,
    quantize_rows,
    quantized_linear,
    scaled_linear,
    weight_only,
)
from qcompile.backends.triton.targets import DEFAULT, occupancy, parse_gpus
from qcompile.errors import LoweringError
from qcompile.numerics import QuantSpec

SHAPES = [(6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336), (8192, 8192)]  # outputs, inputs
ROWS = (1, 16, 64, 256, 2048)
TOKEN, FP8 = "int8 sym token dynamic", "e4m3fn token dynamic"


@dataclass(frozen=True)
class Peaks:
    """Of a GPU, from its data sheet: terabytes a second; dense teraflops in bf16 and in 8 bits."""

    bandwidth: float
    half: float
    eight: float


PEAKS = {
    "H200": Peaks(4.8, 989, 1979),
    "H100": Peaks(3.35, 989, 1979),
    "A100": Peaks(2.0, 312, 624),
    "B200": Peaks(8.0, 2250, 4500),
    "MI300X": Peaks(5.3, 1307, 2615),
}


def form(spec: str, n: int, k: int, layout: str = "tile") -> WeightFormat:
    from dataclasses import replace

    parsed = QuantSpec.parse(spec)
    found = format_of(parsed, (n, k), tuple(parsed.scale_shape((n, k))))
    assert isinstance(found, WeightFormat)
    return replace(found, layout=layout)


def operands(made: WeightFormat, n: int, device: str) -> dict[str, Any]:
    """Random packed weights: what is in them does not matter for time."""
    planes = [_random(shape, dtype, device) for shape, dtype in made.plane_shapes(n)]
    outputs = n // made.rows if made.rows else 1
    scale = _random((made.groups, outputs), torch.float32 if made.scale == "float" else torch.uint8, device)
    factor = torch.ones(1, device=device) if made.outer else None
    return {"planes": planes, "scale": scale, "factor": factor, "format": str(made)}


def _random(shape: Sequence[int], dtype: torch.dtype, device: str) -> Tensor:
    if device == "meta":
        return torch.empty(tuple(shape), dtype=dtype, device=device)
    if dtype.is_floating_point:
        return torch.rand(tuple(shape), device=device).to(dtype)
    return torch.randint(0, 100, tuple(shape), device=device).to(dtype)


def calls(n: int, k: int, m: int, device: str) -> Iterator[tuple[str, Any, tuple[Any, ...], int, int]]:
    """(name, operator, arguments, bytes read and written, bits of the product) of every kind of product."""
    half = torch.bfloat16
    x, written = _random((m, k), half, device), 2 * m * n
    for spec in ("int4 group=128", "int8 channel", "mxfp4", "nvfp4"):
        w = operands(form(spec, n, k), n, device)
        arguments = (x, w["planes"], w["scale"], None, w["factor"], None, None, w["format"])
        yield f"{spec}, bf16", weight_only.WEIGHT_ONLY, arguments, _bytes(w) + 2 * m * k + written, 16
    for spec, layout, codes in (("int8 channel", "rows", torch.int8), ("int4 group=128", "tile", torch.int8)):
        w = operands(form(spec, n, k, layout), n, device)
        row = (_random((m, k), codes, device), _random((m, 1), torch.float32, device))
        arguments = (*row, w["planes"], w["scale"], None, None, w["format"], half)
        yield f"{spec}, int8", quantized_linear.QUANTIZED_LINEAR, arguments, _bytes(w) + m * k + written, 8
    for spec, groups in (("e4m3fn channel", 1), ("e4m3fn block=128x128", k // 128)):
        w = operands(form(spec, n, k, "rows"), n, device)
        row = (_random((m, k), torch.uint8, device), _random((m, groups), torch.float32, device))
        arguments = (*row, w["planes"], w["scale"], None, None, w["format"], half)
        yield f"{spec}, e4m3fn", quantized_linear.QUANTIZED_LINEAR, arguments, _bytes(w) + m * k + written, 8
    w = operands(form("mxfp4", n, k), n, device)
    row = (_random((m, k // 2), torch.uint8, device), _random((m, k // 32), torch.uint8, device))
    arguments = (*row, w["planes"], w["scale"], None, w["format"], half)
    yield "mxfp4, mxfp4", scaled_linear.SCALED_LINEAR, arguments, _bytes(w) + m * k // 2 + written, 8


def others(device: str) -> Iterator[tuple[str, Any, tuple[Any, ...]]]:
    """Operators that are no products of one weight."""
    half = torch.bfloat16
    x = _random((16, 4096), half, device)
    yield "norm + int8", quantize_rows.QUANTIZE_ROWS, (x, _random((4096,), half, device), 1e-5, TOKEN)
    yield "e4m3fn codes", quantize_rows.QUANTIZE_ROWS, (x, None, 0.0, FP8)
    yield "mxfp4 codes", scaled_linear.QUANTIZE_SCALED, (x, "e2m1")
    yield "hadamard 4096 + int8", hadamard.TRANSFORM_QUANTIZE, (x, 1, 4096, False, TOKEN)
    wide = _random((16, 14336), half, device)
    yield "hadamard 14336", hadamard.TRANSFORM, (wide, 28, 14336, False)
    codes, scales = _random((1, 8, 1024, 128), torch.int8, device), _random((1, 8, 1024, 1), torch.float32, device)
    q, mask = _random((1, 32, 1, 128), half, device), _random((1, 1, 1, 1024), torch.uint8, device) > 0
    yield "attention over int8", attention.ATTEND_CODES, (q, codes, scales, codes, scales, mask, 0.1)
    made = form("int4 group=128", 4096, 4096)
    planes = [_random((8, *shape), dtype, device) for shape, dtype in made.plane_shapes(4096)]
    expert, scale = _random((16,), torch.int64, device) % 8, _random((8, 32, 4096), torch.float32, device)
    yield "8 experts int4", experts.EXPERT_LINEAR, (x, expert, planes, scale, None, None, None, str(made))


def _bytes(weight: dict[str, Any]) -> int:
    return sum(t.nbytes for t in (*weight["planes"], weight["scale"]))


# ------------------------------------------------------------------ without a GPU


def resources(names: str) -> list[dict[str, object]]:
    """What every configuration uses, on each GPU."""
    gpus, seen, rows = parse_gpus(names), set[str](), list[dict[str, object]]()
    asked = [(name, op, arguments) for m in ROWS for name, op, arguments, *_ in calls(4096, 4096, m, "meta")]
    for name, op, arguments in [*asked, *others("meta")]:
        for _, _, launches in planned(op, arguments):
            for launch in launches:
                if launch.variant.key in seen:
                    continue
                seen.add(launch.variant.key)
                row: dict[str, object] = {"for": name, "kernel": launch.kernel, "configuration": str(launch.config)}
                for gpu in gpus:
                    try:
                        made = compile_variant(launch.variant, gpu)
                    except LoweringError as error:
                        row[gpu.name] = "–" if "shared memory" in str(error) else str(error)
                        continue
                    share = occupancy(gpu, made.threads // gpu.warp, made.registers, made.shared)
                    spilled = f" ({made.spilled} spilled)" if made.spilled else ""
                    row[gpu.name] = f"{made.registers}{spilled}, {made.shared / 1024:.0f} KB, {share:.0%}"
                rows.append(row)
                print(".", end="", file=sys.stderr, flush=True)
    return rows


# ------------------------------------------------------------------ with one


def microseconds(function: Callable[[], Any]) -> float:
    """Median time of a call, the L2 cache cleared before each."""
    from triton.testing import do_bench

    return float(do_bench(function, warmup=10, rep=50, return_mode="median")) * 1000


def times(peaks: Peaks) -> list[dict[str, object]]:
    """Each kind of product on each shape, beside the least time that bytes and operations allow."""
    rows: list[dict[str, object]] = []
    for n, k in SHAPES:
        for m in ROWS:
            x, dense = _random((m, k), torch.bfloat16, "cuda"), _random((n, k), torch.bfloat16, "cuda")
            half = microseconds(lambda x=x, dense=dense: torch.nn.functional.linear(x, dense))  # type: ignore[misc]
            found: dict[str, tuple[float, int, int]] = {"bf16, cuBLAS": (half, 2 * (m * k + n * k + m * n), 16)}
            for name, op, arguments, moved, bits in calls(n, k, m, "cuda"):
                found[name] = (microseconds(lambda op=op, a=arguments: op(*a)), moved, bits)  # type: ignore[misc]
            found |= _peers(x, dense)
            for name, (took, moved, bits) in found.items():
                least = max(
                    moved / peaks.bandwidth / 1e6, 2 * m * n * k / (peaks.half if bits > 8 else peaks.eight) / 1e6
                )
                rows.append(
                    {
                        **{"shape": f"{k} → {n}", "rows": m, "weights, activations": name, "µs": f"{took:.1f}"},
                        **{"roofline µs": f"{least:.1f}", "of roofline": f"{least / took:.0%}"},
                        **{"GB/s": f"{moved / took / 1e3:.0f}", "times bf16": f"{half / took:.2f}"},
                    }
                )
    return rows


def _peers(x: Tensor, dense: Tensor) -> dict[str, tuple[float, int, int]]:
    """Other libraries' kernels where they install: torch's fp8 product, torchao's int4."""
    found: dict[str, tuple[float, int, int]] = {}
    (m, k), n = x.shape, dense.shape[0]
    if m % 16 == 0 and torch.cuda.get_device_capability() >= (8, 9):
        a, b = x.to(torch.float8_e4m3fn), dense.to(torch.float8_e4m3fn).t()
        one = torch.ones((), device="cuda")
        took = microseconds(lambda: torch._scaled_mm(a, b, scale_a=one, scale_b=one, out_dtype=torch.bfloat16))
        found["e4m3fn tensor, torch._scaled_mm"] = (took, m * k + n * k + 2 * m * n, 8)
    try:
        packed = torch.ops.aten._convert_weight_to_int4pack(_random((n, k // 2), torch.uint8, "cuda"), 8)
        scales = _random((k // 128, n, 2), torch.bfloat16, "cuda")
        took = microseconds(lambda: torch.ops.aten._weight_int4pack_mm(x, packed, 128, scales))
        found["int4 group=128, tinygemm"] = (took, n * k // 2 + 4 * n * k // 128 + 2 * (m * k + m * n), 16)
    except RuntimeError as error:
        print(f"tinygemm left out: {str(error).splitlines()[0]}", file=sys.stderr)
    return found


def memory(peaks: Peaks) -> list[dict[str, object]]:
    """Operators that move rows, beside a copy of the same rows."""
    rows: list[dict[str, object]] = []
    for width in (4096, 8192, 14336):
        x, gain = _random((4096, width), torch.bfloat16, "cuda"), _random((width,), torch.bfloat16, "cuda")
        copy = microseconds(lambda x=x: x.clone())  # type: ignore[misc]
        order = 28 if width == 14336 else 1
        asked = {
            "norm + int8": (quantize_rows.QUANTIZE_ROWS, (x, gain, 1e-5, TOKEN)),
            "hadamard": (hadamard.TRANSFORM, (x, order, width, False)),
            "hadamard + int8": (hadamard.TRANSFORM_QUANTIZE, (x, order, width, False, TOKEN)),
        }
        for name, (op, arguments) in asked.items():
            took = microseconds(lambda op=op, a=arguments: op(*a))  # type: ignore[misc]
            least = x.nbytes * (2 if name == "hadamard" else 1.5) / peaks.bandwidth / 1e6
            rows.append(
                {
                    **{"operator": name, "width": width, "µs": f"{took:.1f}", "copy µs": f"{copy:.1f}"},
                    **{"times the copy": f"{took / copy:.2f}", "roofline µs": f"{least:.1f}"},
                }
            )
    return rows


def main() -> None:
    if not torch.cuda.is_available():
        names = sys.argv[sys.argv.index("--gpu") + 1] if "--gpu" in sys.argv else DEFAULT
        note = (
            "Registers a thread, shared memory of a program, estimated share of a multiprocessor's threads (a compute "
            "unit's for AMD); – where a configuration needs more shared memory than a program gets, and is left out of "
            "bundles. 4096 × 4096 weights, bf16. No GPU was at hand: nothing here is a time. "
            f"Compiled with triton {version('triton')}."
        )
        publish("triton_kernels", "Triton kernels: what they use", resources(names), note)
        return
    name = torch.cuda.get_device_name()
    known = [peaks for chip, peaks in PEAKS.items() if chip in name]
    if not known:
        raise SystemExit(f"{name} is not in PEAKS: add its bandwidth and teraflops")
    from common import table

    note = f"{name}; triton {version('triton')}.\n\n{table(memory(known[0]))}"
    publish("triton_kernels", "Triton kernels beside the roofline", times(known[0]), note)


if __name__ == "__main__":
    main()
