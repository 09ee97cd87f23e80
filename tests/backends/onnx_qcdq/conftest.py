"""Makes `onnx_programs` importable, and lowers each program of the tests once a run."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
from onnx_programs import Lowered, decoder, quantized

from qcompile.backends.onnx_qcdq import OnnxQcdqBackend


@pytest.fixture(scope="session")
def lowered(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str, str | None], Lowered]:
    """(decoder, weight spec, activation spec) → the program, and the directory it was lowered to."""

    @cache
    def make(name: str, weights: str, activations: str | None) -> Lowered:
        program = quantized(decoder(name), weights, activations)
        directory = tmp_path_factory.mktemp(name)
        return Lowered(program, directory, OnnxQcdqBackend().lower(program, directory))

    return make
