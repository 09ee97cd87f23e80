"""Models that the passes are tried on."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

import qcompile as qc
from qcompile import zoo
from qcompile.ir.program import Program

sys.path.insert(0, str(Path(__file__).parents[2]))  # makes the families importable as `families.…`


@pytest.fixture(scope="session")
def family() -> Callable[[str], Program]:
    """A family's program in float64 with gains, biases and eps away from 1 and 0; a fresh copy."""
    from families.captured import capture_family

    @cache
    def made(name: str) -> Program:
        return capture_family(name).program

    return lambda name: made(name).clone()


@pytest.fixture(scope="session")
def embedded() -> Callable[[str], Program]:
    """A model that ships with the package, in float64; a fresh copy."""

    @cache
    def made(name: str) -> Program:
        program = qc.capture(zoo.path(name), dtype=torch.float64)
        assert isinstance(program, Program)
        return program

    return lambda name: made(name).clone()
