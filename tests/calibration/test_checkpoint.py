"""A run that was killed goes on behind its last finished segment, with the same bits; another run is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from calibration import tiny

from qcompile import run_passes
from qcompile.calibration.settings import Settings
from qcompile.errors import QCompileError
from qcompile.ir.program import Program

STAGES_OF_A_SEGMENT = 2


def test_runs_killed_at_ten_points_go_on_with_the_same_bits(tmp_path: Path) -> None:
    script = Path(__file__).parent / "killed.py"
    done = subprocess.run([sys.executable, script, tmp_path], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    told = json.loads(done.stdout.splitlines()[-1])
    assert len(told) == 10
    for run in told:
        assert run["same"], run
        assert run["notes"], run
        assert 0 <= run["redone"] <= STAGES_OF_A_SEGMENT, run
        segments = [f"segment-{i:04d}.safetensors" for i in range(len(run["left"]) - 1)]
        assert run["left"] == ["run.json", *segments], run  # no boundary is needed any more
    assert {run["at"].split()[0] for run in told} == {"before", "half-way", "behind"}


def marked(seed: int = 0, passes: str = "") -> Program:
    program = tiny.decoder(1, "f32")
    program.weights["wv0"] = program.weights["wv0"] + seed
    run_passes(program, f"{passes}insert-qdq(weights=int3 sym group=8)")
    return program


@pytest.fixture
def stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of a run that ended behind its second segment."""
    from qcompile.calibration.engine import Engine

    settle = Engine._settle

    def ending(self: Engine, stage: object) -> object:
        if stage == self.chain.stages[-1]:
            raise KeyboardInterrupt
        return settle(self, stage)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "_settle", ending)
        with pytest.raises(KeyboardInterrupt):
            run_passes(marked(), "gptq", tiny.tokens(), resume=tmp_path)
    return tmp_path


def goes_on(folder: Path, program: Program | None = None, passes: str = "gptq", seed: int = 0) -> None:
    run_passes(program or marked(), passes, tiny.tokens(seed=seed), resume=folder)


def test_what_a_folder_holds(stopped: Path) -> None:
    (folder,) = stopped.iterdir()
    assert folder.name == "01-gptq"
    assert sorted(path.name for path in folder.iterdir()) == [
        *(f"boundary-0001-0000{batch}.safetensors" for batch in range(3)),
        "run.json",
        "segment-0000.safetensors",
        "segment-0001.safetensors",
    ]
    state = json.loads((folder / "run.json").read_text())
    assert state["stages"] == 3
    goes_on(stopped)
    assert not list(folder.glob("boundary*"))


REFUSALS: dict[str, Callable[[Path], None]] = {
    "recipe": lambda folder: goes_on(folder, passes="gptq(damping=0.02)"),
    "settings": lambda folder: run_passes(  # type: ignore[dict-item]
        marked(), "gptq", tiny.tokens(), settings=Settings(true_sequential=False), resume=folder
    ),
    "data": lambda folder: goes_on(folder, seed=1),
    "batches": lambda folder: run_passes(marked(), "gptq", tiny.tokens(batch=2), resume=folder),  # type: ignore[dict-item]
    "model": lambda folder: goes_on(folder, marked(1)),
    "passes before": lambda folder: goes_on(folder, marked(passes="fold-norm-affine, ")),
}


@pytest.mark.parametrize("changed", REFUSALS)
def test_another_run_is_refused(changed: str, stopped: Path) -> None:
    with pytest.raises(QCompileError) as caught:
        REFUSALS[changed](stopped)
    where = stopped / "01-gptq"
    assert str(caught.value) == (
        f"{where} holds a run of another model, recipe or data set; remove it, or give another folder"
    )


def test_edits_that_leave_the_graph_as_it_is_are_another_model(stopped: Path) -> None:
    program = marked()
    program.weights.edit("wo0", lambda weight: weight * 1.5)
    with pytest.raises(QCompileError, match="holds a run of another model"):
        goes_on(stopped, program)


@pytest.mark.parametrize("name", ["segment-0000.safetensors", "boundary-0001-00002.safetensors"])
@pytest.mark.parametrize("how", ["missing", "short", "empty", "changed"])
def test_a_file_that_is_not_as_it_was(name: str, how: str, stopped: Path) -> None:
    path = stopped / "01-gptq" / name
    content = path.read_bytes()
    told = {"missing": "is missing", "changed": "was changed since it was written"}.get(how, "cannot be read")
    if how == "missing":
        path.unlink()
    elif how == "changed":
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    else:
        path.write_bytes(content[: len(content) // 2] if how == "short" else b"")
    with pytest.raises(QCompileError) as caught:
        goes_on(stopped)
    assert str(caught.value) == f"{path} {told}; remove {path.parent} to begin again"


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"{}", b'{"fingerprint": 1}', b"\xff"])
def test_a_broken_index(content: bytes, stopped: Path) -> None:
    path = stopped / "01-gptq" / "run.json"
    path.write_bytes(content)
    with pytest.raises(QCompileError) as caught:
        goes_on(stopped)
    assert str(caught.value) == f"{path} is not what a run writes; remove {path.parent} to begin again"


def test_files_without_an_index_are_left_overs(stopped: Path) -> None:
    """As after a kill before the first segment was finished."""
    folder = stopped / "01-gptq"
    (folder / "run.json").unlink()
    (folder / "boundary-0007-00000.safetensors").write_bytes(b"left")
    (folder / "segment-0000.partial").write_bytes(b"half")
    program = marked()
    goes_on(stopped, program)
    other = marked()
    run_passes(other, "gptq", tiny.tokens())
    assert tiny.same(tiny.codes(program), tiny.codes(other))
    assert sorted(p.name for p in folder.iterdir()) == ["run.json", *(f"segment-000{i}.safetensors" for i in range(3))]


def test_every_dtype_and_views_survive(tmp_path: Path) -> None:
    """What is kept between stages may be a view, shared, a number, or of a type numpy does not know."""
    from qcompile.calibration.checkpoint import Checkpoint
    from qcompile.calibration.processes import Processes
    from qcompile.calibration.store import ValueStore
    from qcompile.calibration.worker import Solved

    base = torch.arange(12.0).view(3, 4)
    values = {"a": base, "b": base.t(), "c": base[1], "d": base.bfloat16(), "e": torch.tensor(7), "f": base > 3}
    values["g"] = torch.zeros(0, 4)
    store = ValueStore(0, tmp_path)
    store.put(0, values)
    folder = tmp_path / "run"
    kept = Checkpoint(folder, "print")
    kept.commit(1, [[Solved({"codes": base.to(torch.int8)}, {"n": 1})]], [(0, {"quantized": values})], Processes())
    again = Checkpoint(folder, "print")
    ((batch, found),) = again.boundary([0])
    assert batch == 0
    for read in (store.get(0), found["quantized"]):
        assert set(read) == set(values)
        assert all(torch.equal(read[name], value) and read[name].dtype == value.dtype for name, value in values.items())
    (((solved,),),) = again.finished()
    assert solved.facts == {"n": 1}
    assert torch.equal(solved.tensors["codes"], base.to(torch.int8))
