"""Finished segments on disk: a run that was killed goes on behind the last of them, with the same bits.

    run.json                        fingerprint, finished stages, and the files that count
    segment-0003.safetensors        what was found at each stage of a segment, for each pass
    boundary-0003-0.safetensors     values behind it, of process 0

A file is written beside its name, forced to disk, and renamed; run.json is written last, so that whatever it names is
whole. Files that it does not name are left-overs of a run that was killed, and are written over.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import qcompile
from qcompile.calibration.processes import Processes
from qcompile.calibration.worker import Solved
from qcompile.errors import QCompileError
from qcompile.ir.program import Program

_PEEK = 256
"""Elements of each weight that the fingerprint looks at."""

Boundary = Mapping[str, Mapping[int, Mapping[str, Tensor]]]


@dataclass(frozen=True)
class Checkpoint:
    """A folder for one run of the engine. Raises QCompileError where it holds another run."""

    folder: Path
    fingerprint: str

    def __post_init__(self) -> None:
        state = self._state()
        if state and state["fingerprint"] != self.fingerprint:
            raise QCompileError(
                f"{self.folder} holds a run of another model, recipe or data set; remove it, or give another folder"
            )

    @property
    def stages(self) -> int:
        """How many stages are finished."""
        return int(self._state().get("stages", 0))

    def finished(self) -> Iterator[list[list[Solved]]]:
        """For each finished segment, for each of its stages, what each pass found."""
        for name in self._state().get("segments", ()):
            yield _read_solved(self.folder / name)

    def boundary(self, processes: Processes) -> dict[str, dict[int, dict[str, Tensor]]]:
        """Values behind the last finished segment, for the batches of this process; none behind the last of all."""
        number = len(self._state()["segments"]) - 1
        path = self.folder / _boundary_name(number, processes.rank)
        found: dict[str, dict[int, dict[str, Tensor]]] = {}
        with safe_open(path, framework="pt") as file:
            for key in file.keys():  # noqa: SIM118 - not a mapping
                stream, batch, name = key.split("/", 2)
                found.setdefault(stream, {}).setdefault(int(batch), {})[name] = file.get_tensor(key)
        return found

    def commit(self, stages: int, solved: Sequence[Sequence[Solved]], boundary: Boundary, processes: Processes) -> None:
        """Add a segment: what was found at its stages, and the values behind it; `stages` are finished then."""
        state = self._state()
        number = len(state.get("segments", ()))
        self.folder.mkdir(parents=True, exist_ok=True)
        flat = {
            f"{stream}/{batch}/{name}": tensor
            for stream, batches in boundary.items()
            for batch, values in batches.items()
            for name, tensor in values.items()
        }
        _write_tensors(self.folder / _boundary_name(number, processes.rank), flat, {})
        processes.wait()
        if processes.writes:
            segment = f"segment-{number:04d}.safetensors"
            _write_solved(self.folder / segment, solved)
            segments = [*state.get("segments", ()), segment]
            text = json.dumps({"fingerprint": self.fingerprint, "stages": stages, "segments": segments}, indent=1)
            _write_bytes(self.folder / "run.json", text.encode())
        processes.wait()
        if number:
            (self.folder / _boundary_name(number - 1, processes.rank)).unlink(missing_ok=True)

    def _state(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        if not path.is_file():
            return {}
        try:
            state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise QCompileError(f"{path} is not JSON; remove the folder, or give another") from None
        return state


def fingerprint(program: Program, passes: Sequence[str], settings: str, data: Sequence[Mapping[str, Tensor]]) -> str:
    """SHA-256 over all that decides the result: graph, weights (some elements of each), passes, settings, data,
    versions of qcompile and torch.
    """
    digest = hashlib.sha256()
    for text in (str(program), *passes, settings, qcompile.__version__, torch.__version__):
        digest.update(text.encode() + b"\0")
    for key in sorted(program.weights):
        digest.update(f"{key} {program.weights.meta(key)}".encode())
        digest.update(_bytes(program.weights.peek(key, _PEEK)))
    for batch in data:
        for name in sorted(batch):
            digest.update(f"{name} {tuple(batch[name].shape)}".encode() + _bytes(batch[name]))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _boundary_name(number: int, rank: int) -> str:
    return f"boundary-{number:04d}-{rank}.safetensors"


def _write_solved(path: Path, solved: Sequence[Sequence[Solved]]) -> None:
    tensors: dict[str, Tensor] = {}
    facts: dict[str, Any] = {}
    for stage, members in enumerate(solved):
        for worker, part in enumerate(members):
            tensors |= {f"{stage}/{worker}/{name}": tensor for name, tensor in part.tensors.items()}
            facts[f"{stage}/{worker}"] = part.facts
    _write_tensors(path, tensors, {"facts": json.dumps(facts)})


def _read_solved(path: Path) -> list[list[Solved]]:
    with safe_open(path, framework="pt") as file:
        facts = json.loads(file.metadata()["facts"])
        stages = 1 + max(int(key.split("/")[0]) for key in facts)
        workers = 1 + max(int(key.split("/")[1]) for key in facts)
        solved = [[Solved(facts=facts[f"{s}/{w}"]) for w in range(workers)] for s in range(stages)]
        for key in file.keys():  # noqa: SIM118 - not a mapping
            stage, worker, name = key.split("/", 2)
            solved[int(stage)][int(worker)].tensors[name] = file.get_tensor(key)
    return solved


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    beside = path.with_suffix(".partial")
    save_file({name: t.detach().cpu().contiguous().clone() for name, t in tensors.items()}, beside, metadata)
    _settle(beside, path)


def _write_bytes(path: Path, content: bytes) -> None:
    beside = path.with_suffix(".partial")
    beside.write_bytes(content)
    _settle(beside, path)


def _settle(beside: Path, path: Path) -> None:
    """On disk under its name, or not at all."""
    with beside.open("rb+") as file:
        os.fsync(file.fileno())
    beside.replace(path)
    with contextlib.suppress(OSError):  # a folder cannot be forced to disk everywhere
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
