"""The interpreter as a fixture, and cubins that tests share."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import qcompile

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))  # cases.py, which the interpreter's process imports as well
NO_TRITON = "triton is not installed (pip install triton; Linux only)"


@pytest.fixture(scope="session")
def triton() -> None:
    """Skips where Triton is not installed."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip(NO_TRITON)


@pytest.fixture(scope="session")
def interpret(triton: None) -> Iterator[Callable[..., dict[str, Any]]]:
    """Run a function of cases.py in a process whose kernels are interpreted; returns its answer."""
    root = Path(qcompile.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": str(root), "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(HERE / "interpreted.py")],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    into, out = process.stdin, process.stdout

    def ask(function: str, **case: Any) -> dict[str, Any]:
        into.write(json.dumps({"function": function, **case}) + "\n")
        into.flush()
        answer: dict[str, Any] = json.loads(out.readline())
        assert "raised" not in answer, answer["raised"]
        return answer

    yield ask
    into.close()
    process.wait(timeout=60)
