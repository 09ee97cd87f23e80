"""Memory of capturing and of reading, by the benchmark's own measure, on a checkpoint larger than the bound."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "capture.py"


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads /proc")
def test_neither_capture_nor_reading_holds_the_model() -> None:
    command = [sys.executable, str(BENCHMARK), "--layers", "2", "--width", "4096", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    imported, captured, read, _ = found["rows"]
    assert found["checkpoint_mb"] > 1200
    assert captured["peak_mb"] < imported["peak_mb"] + 300  # torch.export, sympy and the graph
    assert read["peak_mb"] < captured["resident_mb"] + found["largest_mb"] + 100
    assert read["resident_mb"] < captured["resident_mb"] + 100
