"""Every kernel in Triton's interpreter against float64 of what the package's numerics dequantize.

Sizes are chosen to divide the tiles and not to; K that no run divides, groups, zero-points, strides, parts of K.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

Ask = Callable[..., dict[str, Any]]
GEMV, SPLIT, WIDE, TALL = [1, 64, 4, 2, 1, 1], [16, 32, 4, 2, 2, 1], [16, 32, 4, 2, 1, 2], [64, 32, 4, 2, 1, 1]

WEIGHTS = [
    "int4 group=32",
    "int4 asym group=64",
    "uint4 asym group=32 scale=f16",
    "int8 channel",
    "int8 asym group=64",
    "int3 group=64",
    "uint3 asym group=64",
    "uint2 asym group=64",
    "int5 asym group=32 zero=float",
    "int7 group=32",
    "ternary group=64",
    "int4 tensor",
    "mxfp4",
    "mxfp6_e2m3",
    "mxfp8_e4m3",
    "mxint8",
    "nvfp4",
    "e4m3fn block=32x32",
    "e5m2 channel",
    "nf4 group=64",
]


@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights_of_every_kind_times_one_row(interpret: Ask, spec: str) -> None:
    found = interpret("weight_only", spec=spec, m=1, n=96, k=192, config=GEMV)
    assert found["kernels"] == ["weight_only.gemv"]
    assert found["error"] < 1e-6
    assert found["reference"] < 1e-6


@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights_of_every_kind_times_some_rows(interpret: Ask, spec: str) -> None:
    config = WIDE if spec in ("nvfp4", "mxfp4") else SPLIT
    found = interpret("weight_only", spec=spec, m=5, n=96, k=192, config=config, bias=True)
    assert found["error"] < 1e-6
    assert found["kernels"][0] == "weight_only.gemm"


@pytest.mark.parametrize("m", [1, 3, 16, 17, 64])
def test_rows_that_fill_blocks_and_do_not(interpret: Ask, m: int) -> None:
    found = interpret("weight_only", spec="int4 group=32", m=m, n=33, k=96, config=SPLIT if m > 1 else GEMV)
    assert found["error"] < 1e-6


@pytest.mark.parametrize("config", [GEMV, [1, 32, 4, 2, 2, 2], SPLIT, WIDE, TALL])
@pytest.mark.parametrize("spec", ["int4 channel", "int3 asym channel"])
def test_rows_of_codes_that_no_run_divides(interpret: Ask, spec: str, config: list[int]) -> None:
    m = 1 if config[0] == 1 else 3
    found = interpret("weight_only", spec=spec, m=m, n=40, k=172, config=config, bias=True, strided=True)
    assert found["error"] < 1e-6


@pytest.mark.parametrize(("config", "tolerance"), [(GEMV, 1e-3), (SPLIT, 1e-3), (TALL, 2e-3)])
def test_half_precision(interpret: Ask, config: list[int], tolerance: float) -> None:
    m = 1 if config[0] == 1 else 5
    found = interpret("weight_only", spec="int4 asym group=32", m=m, n=48, k=96, config=config, dtype="float16")
    assert found["error"] < tolerance


def test_the_configuration_of_its_own_choice(interpret: Ask) -> None:
    assert interpret("weight_only", spec="int4 group=128", m=1, n=64, k=512)["error"] < 1e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize(
    "spec",
    [
        "int8 sym token dynamic",
        "int8 sym token dynamic range=narrow",
        "int8 sym group=64 dynamic",
        "e4m3fn token dynamic",
        "e4m3fn group=64 dynamic",
    ],
)
def test_activations_get_the_codes_of_the_numerics(interpret: Ask, spec: str, dtype: str) -> None:
    assert interpret("quantize_rows", spec=spec, m=3, k=192, dtype=dtype) == {"differ": 0.0, "error": 0.0}


@pytest.mark.parametrize("spec", ["int8 sym token dynamic", "e4m3fn group=64 dynamic"])
def test_a_norm_in_front_of_the_codes(interpret: Ask, spec: str) -> None:
    found = interpret("quantize_rows", spec=spec, m=3, k=176 if "token" in spec else 192, gain=True)
    assert found["error"] < 1e-6
    assert found["differ"] < 0.01  # a value between two codes may go to the other one


@pytest.mark.parametrize(
    ("weight", "activation", "layout", "config"),
    [
        ("int8 channel", "int8 sym token dynamic", "rows", None),
        ("int8 channel", "int8 sym token dynamic", "rows", SPLIT),
        ("int8 group=64", "int8 sym token dynamic", "rows", SPLIT),
        ("int8 tensor", "int8 sym group=64 dynamic", "rows", SPLIT),
        ("e4m3fn channel", "e4m3fn token dynamic", "rows", SPLIT),
        ("e4m3fn tensor", "e4m3fn token dynamic", "rows", TALL),
        ("e4m3fn block=32x64", "e4m3fn group=64 dynamic", "rows", SPLIT),
        ("int4 group=32", "int8 sym token dynamic", "tile", SPLIT),
        ("int4 channel scale=f16", "int8 sym token dynamic", "tile", TALL),
        ("int3 group=64", "int8 sym token dynamic", "tile", SPLIT),
    ],
)
def test_quantized_activations_times_quantized_weights(
    interpret: Ask, weight: str, activation: str, layout: str, config: list[int] | None
) -> None:
    found = interpret(
        "quantized_linear",
        **{"weight": weight, "activation": activation, "m": 5, "n": 96, "k": 192},
        **{"layout": layout, "config": config, "bias": True},
    )
    assert found["error"] < 2e-6
    assert found["reference"] < 2e-6


@pytest.mark.parametrize("weight", ["int8 channel", "int4 channel"])
def test_integers_of_a_width_that_no_step_divides(interpret: Ask, weight: str) -> None:
    layout = "rows" if weight.startswith("int8") else "tile"
    case = {"weight": weight, "activation": "int8 sym token dynamic", "m": 3, "n": 40, "k": 172, "layout": layout}
    assert interpret("quantized_linear", **case, config=SPLIT)["error"] < 2e-6


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("element", ["e2m1", "e4m3fn"])
def test_microscaling_activations(interpret: Ask, element: str, dtype: str) -> None:
    assert interpret("quantize_scaled", element=element, m=3, k=192, dtype=dtype) == {"differ": 0.0, "exponents": True}


@pytest.mark.parametrize("emulate", [None, "fp32"])
@pytest.mark.parametrize("weight", ["mxfp4", "mxfp8_e4m3"])
def test_block_scaled_products(interpret: Ask, weight: str, emulate: str | None) -> None:
    config = [16, 32, 4, 2, 2, 2]
    found = interpret("scaled_linear", weight=weight, m=5, n=40, k=160, config=config, bias=True, emulate=emulate)
    assert found["error"] < 1e-6
    assert found["reference"] < 1e-6


@pytest.mark.parametrize(
    ("shape", "order", "block"), [([5, 128], 1, 64), ([3, 96], 12, 96), ([2, 512], 1, 256), ([2, 3, 384], 12, 384)]
)
@pytest.mark.parametrize("inverse", [False, True])
def test_the_transform(interpret: Ask, shape: list[int], order: int, block: int, inverse: bool) -> None:
    assert interpret("hadamard", shape=shape, order=order, block=block, inverse=inverse)["error"] < 2e-6


def test_the_transform_in_half_precision(interpret: Ask) -> None:
    assert interpret("hadamard", shape=[3, 384], order=12, block=384, dtype="float16")["error"] < 1e-3


@pytest.mark.parametrize("spec", ["int8 sym token dynamic", "e4m3fn token dynamic"])
@pytest.mark.parametrize(("order", "block"), [(1, 64), (12, 192)])
def test_codes_behind_the_transform(interpret: Ask, spec: str, order: int, block: int) -> None:
    found = interpret("hadamard", shape=[3, block], order=order, block=block, spec=spec)
    assert found["error"] < 1e-6
    assert found["differ"] < 0.01
    assert found["apart"] <= 1


@pytest.mark.parametrize(
    ("batch", "heads", "groups", "new", "tokens", "width", "masked"),
    [(2, 4, 2, 1, 70, 32, True), (1, 4, 2, 3, 33, 24, True), (1, 2, 2, 1, 5, 16, False), (1, 8, 1, 20, 30, 16, True)],
)
def test_attention_over_codes(
    interpret: Ask, batch: int, heads: int, groups: int, new: int, tokens: int, width: int, masked: bool
) -> None:
    case = {"batch": batch, "heads": heads, "groups": groups, "new": new, "tokens": tokens, "width": width}
    found = interpret("attention", **case, masked=masked)
    assert found["error"] < 1e-6
    assert found["reference"] < 1e-6


@pytest.mark.parametrize("tokens", [1, 7, 37])
@pytest.mark.parametrize("spec", ["int4 group=32", "int4 asym group=32", "nvfp4", "int3 channel"])
def test_packed_experts(interpret: Ask, spec: str, tokens: int) -> None:
    config = [16, 32, 4, 2, 1, 2 if spec == "nvfp4" else 1]
    found = interpret("experts", spec=spec, tokens=tokens, count=4, n=40, k=96, config=config)
    assert found["error"] < 1e-6
    assert found["reference"] < 1e-6
