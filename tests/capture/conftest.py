"""One saved model and its program for each family, made once a run; makes `capture_models` importable."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from qcompile.capture import capture
from qcompile.ir.program import Program

sys.path.insert(0, str(Path(__file__).parent))
import capture_models as models


@dataclass(frozen=True)
class Captured:
    """A model directory, transformers' model of it, and its program."""

    directory: Path
    model: Any
    program: Program


@pytest.fixture(scope="session")
def captured(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Captured]:
    """Family name → saved, loaded and captured model."""

    @cache
    def make(name: str) -> Captured:
        from transformers import AutoModelForCausalLM

        directory = models.save(name, tmp_path_factory.mktemp(name))
        return Captured(directory, AutoModelForCausalLM.from_pretrained(directory).eval(), capture(directory))

    return make
