"""Targets beside the CPU: compiled, not run; what fails costs a note."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlir_programs import llama, products, quantized

from qcompile.artifact import export_program
from qcompile.backends.torch_mlir import TorchMlirBackend, toolchain
from qcompile.backends.torch_mlir.gpus import GPU, parse_gpus
from qcompile.errors import RecipeError


def test_names() -> None:
    assert parse_gpus("none") == parse_gpus("") == ()
    assert parse_gpus("cuda, rocm:gfx90a,vulkan") == (
        GPU("cuda", "sm_80"),
        GPU("rocm", "gfx90a"),
        GPU("vulkan", "rdna3"),
    )
    assert "--iree-hal-target-device=__device_1=hip[1]" in GPU("rocm", "gfx942").flags(2)
    with pytest.raises(
        RecipeError, match=r"also='cuda:sm80' is unknown .did you mean 'cuda:sm_80'.*; known: cuda, .*vulkan:"
    ):
        TorchMlirBackend(also="cuda:sm80")
    with pytest.raises(RecipeError, match="two chips of cuda, whose file is one"):
        TorchMlirBackend(also="cuda:sm_80,cuda:sm_86")
    with pytest.raises(RecipeError, match="use dialect=iree"):
        TorchMlirBackend(also="cuda", dialect="brevitas")


def test_modules_are_compiled_and_failures_noted(iree: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = toolchain.attempt

    def attempt(mlir: Path, out: Path, flags: list[str]) -> toolchain.Attempt:
        """The compiler's, which knows no such chip of ROCm and leaves half a file."""
        wrong = [flag.replace("gfx942", "gfx0") for flag in flags]
        made = real(mlir, out, wrong)
        if wrong != flags:
            out.write_bytes(b"half")
        return made

    monkeypatch.setattr(toolchain, "attempt", attempt)
    program = products({"g": ("int4 sym group=16", None), "plain": (None, None)})
    backend = TorchMlirBackend(also="cuda:sm_80,rocm:gfx942,vulkan")
    artifact = export_program(program, tmp_path / "out", backend, {})
    files, build = artifact.manifest.files, artifact.manifest.build
    assert {"model.vmfb", "model.cuda.vmfb", "model.vulkan.vmfb"} <= set(files)
    assert not (artifact.directory / "model.rocm.vmfb").exists()
    assert b"sm_80" in (artifact.directory / "model.cuda.vmfb").read_bytes()  # its PTX says what it is for
    assert [(b["target"], "error" in b) for b in build["also"]] == [
        ("cuda:sm_80", False),
        ("rocm:gfx942", True),
        ("vulkan:rdna3", False),
    ]
    assert "--iree-cuda-target=sm_80" in build["also"][0]["flags"]
    assert [a["module"] for a in build["attempts"]] == ["model.mlir"]
    assert "cuda:sm_80: model.cuda.vmfb was compiled, not run" in artifact.manifest.notes
    assert any("rocm:gfx942: iree-compile refuses model.mlir" in n and "gfx0" in n for n in artifact.manifest.notes)
    assert artifact.manifest.agreement is not None  # the CPU's was run


def test_every_shard_is_compiled(iree: None, tmp_path: Path) -> None:
    program = quantized(llama(), "int4 sym group=16")
    files = TorchMlirBackend(shards="layers:2", opt_level="O2", also="cuda").lower(program, tmp_path)
    assert [b["file"] for b in files.build["also"]] == ["shard_0.cuda.vmfb", "shard_1.cuda.vmfb"]
    assert all("error" not in b and (tmp_path / b["file"]).stat().st_size > 1000 for b in files.build["also"])
