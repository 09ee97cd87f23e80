"""Runs of GPTQ on a tiny decoder, killed while they write their checkpoint: ``python killed.py FOLDER``.

Each run is a child of its own, and ends in SIGKILL: before the n-th file has its name, half-way through writing it, or
just behind. Prints JSON: what each run and the one that goes on with it did.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from calibration import tiny

from qcompile import run_passes
from qcompile.calibration import checkpoint
from qcompile.calibration.engine import Engine
from qcompile.ir.program import Program

KILLS = 10
BATCHES = tiny.tokens(6, 5, 3)


def marked() -> Program:
    program = tiny.decoder(1)
    run_passes(program, "insert-qdq(weights=int3 sym group=8, activations=int8 asym tensor static)")
    return program


def run(folder: Path | None) -> dict[str, Any]:
    """The stages that were computed, and all codes, scales and notes."""
    seen: list[str] = []
    settle = Engine._settle

    def counted(self: Engine, stage: Any) -> Any:
        seen.append(f"{self.chain.stages.index(stage)}")
        return settle(self, stage)

    Engine._settle = counted  # type: ignore[method-assign]
    try:
        program = marked()
        reports = run_passes(program, "calibrate, gptq(target=float)", BATCHES, resume=folder)
    finally:
        Engine._settle = settle  # type: ignore[method-assign]
    notes = [note for report in reports for note in report.notes]
    return {"stages": len(seen), "codes": tiny.codes(program), "notes": notes}


def files(folder: Path) -> int:
    """How many files a run without a kill writes."""
    count = 0
    settle = checkpoint._settle

    def counted(beside: Path, path: Path) -> None:
        nonlocal count
        count += 1
        settle(beside, path)

    checkpoint._settle = counted
    run(folder)
    checkpoint._settle = settle
    return count


def killed(folder: Path, at: int, how: str) -> int:
    """Run in a child that dies at the `at`-th file; returns how many stages it had computed."""
    source, sink = os.pipe()
    child = os.fork()
    if not child:
        os.close(source)
        _die(at, how)
        settle = Engine._settle

        def told(self: Engine, stage: Any) -> Any:
            os.write(sink, b".")
            return settle(self, stage)

        Engine._settle = told  # type: ignore[method-assign]
        run_passes(marked(), "calibrate, gptq(target=float)", BATCHES, resume=folder)
        os._exit(0)
    os.close(sink)
    with os.fdopen(source, "rb") as pipe:
        stages = len(pipe.read())
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status
    assert os.WTERMSIG(status) == signal.SIGKILL, status
    return stages


def _die(at: int, how: str) -> None:
    calls = 0
    settle: Callable[[Path, Path], None] = checkpoint._settle

    def dying(beside: Path, path: Path) -> None:
        nonlocal calls
        calls += 1
        if calls == at and how == "behind":
            settle(beside, path)
        if calls == at and how == "half-way":
            content = beside.read_bytes()
            beside.write_bytes(content[: len(content) // 2])
        if calls == at:
            os.kill(os.getpid(), signal.SIGKILL)
        settle(beside, path)

    checkpoint._settle = dying


def main(root: Path) -> None:
    torch.set_num_threads(1)
    whole = run(None)
    total = files(root / "whole")
    assert run(root / "whole")["stages"] == 0  # all of it is found
    chance = random.Random(0)
    points = [(chance.randint(1, total), ("before", "half-way", "behind")[i % 3]) for i in range(KILLS)]
    told = []
    for number, (at, how) in enumerate(points):
        folder = root / str(number)
        before = killed(folder, at, how)
        after = run(folder)
        left = sorted(str(path.name) for path in next(folder.iterdir()).iterdir())
        told.append(
            {
                "at": f"{how} file {at} of {total}",
                "same": tiny.same(after["codes"], whole["codes"]),
                "notes": after["notes"] == whole["notes"],
                "redone": before + after["stages"] - whole["stages"],
                "left": left,
            }
        )
    print(json.dumps(told))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
