"""What data is run in, and weights that several stages read."""

from __future__ import annotations

import platform
import subprocess
import sys
import weakref
from typing import Any

import pytest
import torch
from calibration import tiny

from qcompile import run_passes
from qcompile.calibration import engine
from qcompile.calibration.settings import Settings
from qcompile.calibration.slices import Slice
from qcompile.ir.program import Program

HALF = Settings(compute="bfloat16")
MARK = "insert-qdq(weights=int4 sym group=8)"


def rounded(dtype: str, settings: Settings) -> dict[str, torch.Tensor]:
    program = tiny.decoder(2, dtype)
    run_passes(program, f"{MARK}, gptq", tiny.tokens(), settings=settings)
    return tiny.codes(program)


def test_linear_layers_in_bfloat16() -> None:
    program = Program.parse(
        "def main(x: f32[2, 8], *, w: f32[4, 8], b: f32[4]):\n    y = aten.linear.default(x, w, b)\n    return {'y': y}"
    )
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    w, b = program.weights["w"], program.weights["b"]
    half = Slice(program, [], ["y"], halved=True)
    exact = (x.bfloat16() @ w.bfloat16().t()).float() + b
    assert torch.equal(half.run({}, {"x": x})["y"], exact)
    assert torch.equal(half.run({}, {"x": 2 * x})["y"], (2 * x).bfloat16().matmul(w.bfloat16().t()).float() + b)
    assert torch.equal(Slice(program, [], ["y"]).run({}, {"x": x})["y"], torch.nn.functional.linear(x, w, b))


def test_only_float32_is_computed_in_bfloat16() -> None:
    plain, half = rounded("f32", Settings()), rounded("f32", HALF)
    parts = [key for key in plain if key.endswith(".codes")]
    other = sum(int((plain[key] != half[key]).sum()) for key in parts) / sum(plain[key].numel() for key in parts)
    assert 0 < other < 0.05
    assert tiny.same(rounded("f64", Settings()), rounded("f64", HALF))


def test_a_weight_that_later_stages_read_too_is_told() -> None:
    program = Program.parse(
        """def main(input_ids: i64[batch, sequence], *, e: f64[32, 16], w: f64[16, 16], g: f64[16]):
    x = aten.embedding.default(e, input_ids)
    a = aten.linear.default(x, w)
    n = aten.rms_norm.default(a, [16], g, 1e-3)
    y = aten.linear.default(n, w)
    return {"y": y}"""
    )
    reports = run_passes(program, f"{MARK}, gptq", tiny.tokens())
    line = "w: 1 of the 2 products that read it come in later stages; it is rounded by what the others read"
    assert line in reports[-1].notes


def test_what_was_found_is_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    """Codes are in the program; a second copy of all of them would grow with every layer."""
    found: list[weakref.ref[Any]] = []
    settle = engine.Engine._settle

    class Held(list[Any]):
        """A list that can be watched."""

    def watched(self: engine.Engine, stage: Any) -> Any:
        assert all(held() is None for held in found)
        held = Held(settle(self, stage))
        found.append(weakref.ref(held))
        return held

    monkeypatch.setattr(engine.Engine, "_settle", watched)
    rounded("f64", Settings())
    assert len(found) > 4


def test_batches_are_run_in_portions(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole samples, with their masks, and never none; what comes out does not depend on it."""
    ids = torch.arange(30).view(5, 6)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "scale": torch.tensor(2.0)}
    whole = rounded("f64", Settings())
    for most, sizes in ((1024, [5]), (12, [2, 2, 1]), (1, [1] * 5)):
        monkeypatch.setattr(engine, "PORTION", most)
        parts = list(engine._portions(batch))
        assert [len(part["input_ids"]) for part in parts] == [len(part["attention_mask"]) for part in parts] == sizes
        assert torch.equal(torch.cat([part["input_ids"] for part in parts]), ids)
        assert all(float(part["scale"]) == 2.0 for part in parts)
        assert tiny.same(rounded("f64", Settings()), whole)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="its allocator")
def test_memory_that_was_freed_is_used_again_and_can_be_given_back() -> None:
    code = """
import resource, torch
from qcompile.calibration.machine import give_back, keep_freed, resident
def filled(size):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.empty(size).fill_(1.0)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
keep_freed()
held = [filled(12 << 20), filled(5 << 20), filled(5 << 20), filled(2 << 20)]
before = resident()
give_back()
print(*held, (before - resident()) >> 20)
"""
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    first, *others, returned = map(int, done.stdout.split())
    assert max(others) < first / 10  # pages that were filled in for the first
    assert returned > 40
