"""Makes `mlir_programs` importable, and exports each artifact of the tests once a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from mlir_programs import llama, quantized

from qcompile.artifact import Artifact, export_program
from qcompile.backends.torch_mlir import TorchMlirBackend
from qcompile.backends.torch_mlir.toolchain import missing
from qcompile.ir.program import Program

Exported = Callable[[str], tuple[Program, Artifact]]


@pytest.fixture(scope="session")
def iree() -> None:
    """Skip where IREE is not installed."""
    if (reason := missing()) is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def exported(iree: None, tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """Shards → a tiny Llama with int4 weights in groups of 16, and its artifact."""

    @cache
    def make(shards: str) -> tuple[Program, Artifact]:
        program = quantized(llama(), "int4 asym group=16")
        directory = tmp_path_factory.mktemp("artifacts") / shards.replace(":", "")
        return program, export_program(program, directory, TorchMlirBackend(shards=shards), {})

    return make
