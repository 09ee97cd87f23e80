"""The same on a GPU: kernels compiled just in time, and bundles through the driver. Skipped where there is none."""

from __future__ import annotations

from pathlib import Path

import cases
import pytest
import torch
from test_kernels import WEIGHTS

import qcompile
from qcompile import zoo
from qcompile.backends.triton.backend import TritonBackend
from qcompile.backends.triton.runtime import TritonRunner, gpu_name
from qcompile.backends.triton.targets import GPUS

pytestmark = [
    pytest.mark.usefixtures("triton"),
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
]
DTYPES = [("float16", 2e-3), ("bfloat16", 2e-2), ("float32", 1e-5)]


@pytest.mark.parametrize(("dtype", "tolerance"), DTYPES)
@pytest.mark.parametrize("m", [1, 16, 64, 256])
@pytest.mark.parametrize("spec", WEIGHTS)
def test_weights_of_every_kind(spec: str, m: int, dtype: str, tolerance: float) -> None:
    assert cases.weight_only(spec, m, 384, 768, dtype=dtype, bias=True, device="cuda")["error"] < tolerance


@pytest.mark.parametrize("m", [1, 64, 256])
@pytest.mark.parametrize(
    ("weight", "activation", "layout"),
    [
        ("int8 channel", "int8 sym token dynamic", "rows"),
        ("int4 group=128", "int8 sym token dynamic", "tile"),
        ("e4m3fn channel", "e4m3fn token dynamic", "rows"),
        ("e4m3fn block=128x128", "e4m3fn group=128 dynamic", "rows"),
    ],
)
def test_quantized_activations(weight: str, activation: str, layout: str, m: int) -> None:
    found = cases.quantized_linear(weight, activation, m, 384, 768, layout=layout, device="cuda")
    assert found["error"] < 1e-4


@pytest.mark.parametrize("weight", ["mxfp4", "mxfp8_e4m3"])
def test_block_scaled_products(weight: str) -> None:
    assert cases.scaled_linear(weight, 64, 384, 768, device="cuda")["error"] < 2e-2


@pytest.mark.parametrize("spec", ["int8 sym token dynamic", "e4m3fn group=64 dynamic"])
def test_codes_of_activations(spec: str) -> None:
    assert cases.quantize_rows(spec, 33, 768, "bfloat16", device="cuda") == {"differ": 0.0, "error": 0.0}


@pytest.mark.parametrize(("order", "block"), [(1, 64), (1, 4096), (28, 14336)])
def test_transforms(order: int, block: int) -> None:
    assert cases.hadamard([8, block], order, block, dtype="bfloat16", device="cuda")["error"] < 1e-2


def test_attention_and_experts() -> None:
    assert cases.attention(2, 32, 8, 1, 1000, 128, dtype="float16", device="cuda")["error"] < 2e-3
    assert cases.experts("int4 group=32", 64, 8, 384, 768, device="cuda")["error"] < 1e-5


@pytest.mark.parametrize("executor", ["jit", "binary"])
def test_a_bundle_generates_as_its_program(tmp_path: Path, executor: str) -> None:
    name = gpu_name()
    model = qcompile.compile(zoo.path("llama"), recipe="int4-g128")
    gpu = name if executor == "binary" and name in GPUS else "none"
    artifact = model.export("triton", tmp_path / "llama", {"gpu": gpu})
    runner = TritonRunner(artifact.directory, executor)  # type: ignore[arg-type]
    ids = torch.tensor([[1, 40, 41, 5]])
    assert torch.equal(runner.generate(ids, 8), model.generate(ids, 8))
    if executor == "binary":
        assert TritonRunner(artifact.directory).executor == f"binary ({name})"
        assert TritonBackend().tune(artifact.directory)
