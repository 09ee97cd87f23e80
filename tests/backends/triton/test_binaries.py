"""Every kernel for every GPU, compiled without one: binaries, what a launch must pass, and what they use.

One small configuration of each; benchmarks/triton_kernels.py compiles all of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import cases
import pytest
import torch
from torch import Tensor

from qcompile.backends.triton.aot import compile_variant, parameters
from qcompile.backends.triton.binaries import compiled_sites, folder_of, write_binaries
from qcompile.backends.triton.bundle import KernelEntry
from qcompile.backends.triton.enumerate_launches import Needed
from qcompile.backends.triton.launch import Config, Launch
from qcompile.backends.triton.ops import attention, experts, hadamard, quantize_rows, quantized_linear, scaled_linear
from qcompile.backends.triton.ops import weight_only as wo
from qcompile.backends.triton.targets import DEFAULT, GPUS, occupancy, parse_gpus
from qcompile.errors import LoweringError

pytestmark = pytest.mark.usefixtures("triton")
TOKEN = "int8 sym token dynamic"


def made(shape: Sequence[int], dtype: torch.dtype = torch.float16) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def weight(spec: str, layout: str = "tile") -> dict[str, Any]:
    parts, _ = cases.packed(spec, 64, 128, layout=layout)
    found: dict[str, Any] = {k: v.to("meta") if isinstance(v, Tensor) else v for k, v in parts.items()}
    return {**found, "planes": [plane.to("meta") for plane in parts["planes"]]}


def launches() -> dict[str, Launch]:
    """One of each kernel, in half precision."""
    x, small = made((16, 128)), Config(16, 32, 2, 2)
    int4, w8, fp8, mx = (
        weight("int4 group=32"),
        weight("int8 channel", "rows"),
        weight("e4m3fn channel", "rows"),
        weight("mxfp4"),
    )
    codes, scale = made((16, 128), torch.int8), made((16, 1), torch.float32)
    linear = ("planes", "scale", "factor")
    cache = [made((1, 2, 64, w), d) for w, d in ((32, torch.int8), (1, torch.float32))] * 2
    stacked = [plane[None].expand(2, *plane.shape) for plane in int4["planes"]]
    found = [
        wo.plan(x, bias=None, config=Config(16, 32, 2, 2, 2), **int4)[1],
        wo.plan(x[:1], bias=None, config=Config(1, 32, 2, 2), **int4)[1],
        quantize_rows.plan(x, made((128,)), 1e-5, TOKEN)[1],
        quantized_linear.plan(codes, scale, *(w8[n] for n in linear), None, w8["format"], x.dtype, small)[1],
        quantized_linear.plan(codes, scale, *(int4[n] for n in linear), None, int4["format"], x.dtype, small)[1],
        scaled_linear.plan_quantize(x, "e2m1")[1],
        scaled_linear.plan(
            made((16, 64), torch.uint8),
            made((16, 4), torch.uint8),
            *(mx["planes"], mx["scale"], None, mx["format"], x.dtype),
            Config(16, 32, 2, 2, 1, 4),
        )[1],
        hadamard.plan_quantize(made((2, 1024)), 1, 1024, False, TOKEN)[1],
        attention.plan(made((1, 4, 1, 32)), *cache, made((1, 1, 1, 64), torch.bool), 0.2)[1],
        experts.plan(
            *(x, made((16,), torch.int64), stacked, int4["scale"][None].expand(2, -1, -1)),
            *(None, None, None, int4["format"], small),
        )[1],
    ]
    by_name = {launch.kernel: launch for group in found for launch in group}
    fp8_launch = quantized_linear.plan(
        made((16, 128), torch.uint8), scale, *(fp8[n] for n in linear), None, fp8["format"], x.dtype, small
    )[1][0]
    return {**by_name, "eight_bit.gemm e4m3": fp8_launch}


KERNELS = [
    *("weight_only.gemm", "weight_only.gemv", "weight_only.reduce", "rows.quantize", "eight_bit.gemm"),
    *("eight_bit.gemm e4m3", "narrow_int.gemm", "scaled.quantize", "scaled.gemm", "hadamard.transform"),
    *("attention.attend", "attention.combine", "experts.gemm"),
]


@pytest.fixture(scope="module")
def every() -> dict[str, Launch]:
    return launches()


def test_every_kernel_has_a_test(every: dict[str, Launch]) -> None:
    import ast

    from qcompile.backends.triton import kernels

    assert set(every) == set(KERNELS)
    written = set()
    for path in Path(kernels.__path__[0]).glob("*.py"):
        if path.stem in ("__init__", "decode"):
            continue
        functions = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.FunctionDef)]
        called = {
            c.func.id
            for f in functions
            for c in ast.walk(f)
            if isinstance(c, ast.Call) and isinstance(c.func, ast.Name)
        }
        written |= {f"{path.stem}.{f.name}" for f in functions if f.name not in called}
    assert written == {name.split()[0] for name in KERNELS}


@pytest.mark.parametrize("gpu", DEFAULT.split(","))
@pytest.mark.parametrize("kernel", KERNELS)
def test_it_compiles_and_takes_what_a_launch_passes(every: dict[str, Launch], kernel: str, gpu: str) -> None:
    target, variant = GPUS[gpu], every[kernel].variant
    binary = compile_variant(variant, target)
    passed = [8 if kind.startswith("*") else 4 for _, kind, _ in variant.signature]
    assert parameters(binary.assembly, target) == passed + [8] * binary.hidden
    assert binary.code[:4] == b"\x7fELF"
    assert binary.name.encode() in binary.code
    assert binary.threads == variant.warps * target.warp
    assert 0 < binary.registers <= (255 if target.backend == "cuda" else 512)
    assert binary.spilled == 0
    assert binary.shared <= target.shared_a_program
    assert 0 < occupancy(target, variant.warps, binary.registers, binary.shared) <= 1
    assert ".loc" not in binary.assembly  # nothing says where it was compiled


def test_what_lies_in_the_files(every: dict[str, Launch], tmp_path: Path) -> None:
    variant, config = every["weight_only.reduce"].variant, str(every["weight_only.reduce"].config)
    entry = write_binaries(Needed({variant.key: (variant, config)}, {}), parse_gpus("sm_90,gfx942"), tmp_path)[
        variant.key
    ]
    folder = tmp_path / "kernels" / folder_of(variant)
    assert {p.relative_to(folder).as_posix() for p in folder.rglob("*.*")} == {
        f"sm_90/{config}.cubin",
        f"sm_90/{config}.ptx",
        f"gfx942/{config}.hsaco",
    }
    again = KernelEntry.model_validate_json(entry.model_dump_json())
    assert again.variant() == variant
    assert again.binaries["sm_90"].symbol == "reduce"


def test_configurations_that_spill_are_chosen_last(every: dict[str, Launch], tmp_path: Path) -> None:
    variant = every["weight_only.reduce"].variant
    wanted = Needed({variant.key: (variant, "m1")}, {"place": {"first": (variant.key,), "second": ("other",)}})
    gpus = parse_gpus("sm_90")
    entry = write_binaries(Needed(wanted.variants, {}), gpus, tmp_path)[variant.key]
    spilling = {"sm_90": entry.binaries["sm_90"].model_copy(update={"spilled": 8})}
    entries = {variant.key: entry.model_copy(update={"binaries": spilling}), "other": entry}
    assert compiled_sites(wanted, entries, gpus) == {"place": {"sm_90": ("second", "first")}}


def test_a_configuration_that_is_too_large_is_left_out_with_a_reason(every: dict[str, Launch]) -> None:
    tiny = replace(GPUS["sm_90"], shared_a_program=16)
    with pytest.raises(LoweringError, match=r"needs \d+ bytes of shared memory on sm_90, a program gets 16"):
        compile_variant(every["weight_only.gemm"].variant, tiny)


def test_a_site_without_any_binary_is_an_error(every: dict[str, Launch], tmp_path: Path) -> None:
    variant = every["weight_only.gemm"].variant
    wanted = Needed({variant.key: (variant, "m16")}, {"somewhere": {"m16 parts=1": (variant.key,)}})
    tiny = replace(GPUS["sm_90"], shared_a_program=16)
    with pytest.raises(
        LoweringError, match=r"no configuration for sm_90 at somewhere: .* leave this configuration out"
    ):
        write_binaries(wanted, [tiny], tmp_path)


def test_occupancy_by_each_limit() -> None:
    h200 = GPUS["sm_90"]
    assert occupancy(h200, 4, 32, 0) == 1
    assert occupancy(h200, 4, 255, 0) == 8 / 64 * 1.0
    assert occupancy(h200, 4, 32, 100 << 10) == 2 * 128 / 2048
