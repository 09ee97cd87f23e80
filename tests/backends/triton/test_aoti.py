"""The package for CPUs. Compiling even a tiny graph takes a C++ compiler half a minute and more: asked for by name."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.artifact import export_program
from qcompile.backends.triton.aoti import AotiBackend, AotiRunner
from qcompile.drift import drift
from qcompile.errors import ArtifactError, LoweringError
from qcompile.ir.program import Program

TEXT = """\
def main(x: f32[batch, 64], *, w: f32[48, 64]):
    y = aten.linear.default(x, w)
    return {"y": y}"""


def program(passes: str) -> Program:
    made = Program.parse(TEXT)
    qcompile.run_passes(made, passes)
    return made


@pytest.mark.skipif("QCOMPILE_TEST_AOTI" not in os.environ, reason="slow: set QCOMPILE_TEST_AOTI=1")
@pytest.mark.skipif(shutil.which("g++") is None, reason="AOTInductor needs a C++ compiler")
def test_a_package_computes_on_packed_weights(tmp_path: Path) -> None:
    made = program("insert-qdq(weights=int4 group=32), rtn")
    artifact = export_program(made, tmp_path / "out", AotiBackend(), {})
    assert artifact.manifest.agreement is not None
    assert artifact.manifest.agreement.max_relative_error < 1e-5
    qcompile.verify(artifact.directory)
    feeds = {"x": torch.randn(7, 64)}
    assert drift(AotiRunner(artifact.directory).run(feeds), made.run(feeds)) < 1e-5


def test_activations_that_are_quantized_are_refused() -> None:
    made = program("insert-qdq(weights=int4 group=32, activations=int8 sym token dynamic), rtn")
    reasons = {obstacle.reason for obstacle in AotiBackend().obstacles(made)}
    assert reasons == {"AOTInductor compiles no scales that are chosen as it runs; quantize weights alone"}


def test_a_directory_that_holds_none(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"has no model\.pt2; give a directory exported with --target aoti"):
        AotiRunner(tmp_path)


def test_nothing_is_left_behind_where_it_does_not_compile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: object, **named: object) -> None:
        raise RuntimeError("no compiler")

    monkeypatch.setattr(torch._inductor, "aoti_compile_and_package", refuse)
    with pytest.raises(LoweringError, match="AOTInductor does not compile the graph: no compiler"):
        export_program(program("insert-qdq(weights=int4 group=32), rtn"), tmp_path / "out", AotiBackend(), {})
    assert not (tmp_path / "out").exists()
