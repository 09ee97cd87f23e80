"""Finished segments on disk: a run that was killed goes on behind the last of them, with the same bits.

    run.json                            fingerprint, finished stages, and the files of finished segments
    segment-0003.safetensors            what was found at each stage of a segment, for each pass
    boundary-0003-00017.safetensors     values behind it, of batch 17; none behind the last segment

A file is written beside its name, forced to disk, and renamed; run.json is written last, so that whatever it names is
whole. Files that it does not name are left-overs of a run that was killed: they are written over, or removed.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

import qcompile
from qcompile.calibration.processes import Processes
from qcompile.calibration.worker import Solved
from qcompile.errors import QCompileError
from qcompile.ir.program import Program

_PEEK = 256
"""Elements of each weight that the fingerprint looks at."""

Values = Mapping[str, Mapping[str, Tensor]]
"""Stream → name → the value of one batch."""


@dataclass(frozen=True)
class Checkpoint:
    """A folder for one run of the engine. Raises QCompileError where it holds another run, or broken files."""

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

    def boundary(self, batches: Iterable[int]) -> Iterator[tuple[int, Values]]:
        """Values behind the last finished segment, batch by batch; there are none behind the last of all."""
        number = len(self._state()["segments"]) - 1
        for batch in batches:
            tensors, _ = _read_tensors(self.folder / _boundary_name(number, batch))
            values: dict[str, dict[str, Tensor]] = {}
            for key, tensor in tensors.items():
                stream, name = key.split("/", 1)
                values.setdefault(stream, {})[name] = tensor
            yield batch, values

    def commit(
        self,
        stages: int,
        solved: Sequence[Sequence[Solved]],
        boundary: Iterable[tuple[int, Values]],
        processes: Processes,
    ) -> None:
        """Add a segment: what was found at its stages, and the values behind it, of the batches of this process;
        `stages` are finished then.
        """
        state = self._state()
        number = len(state.get("segments", ()))
        self.folder.mkdir(parents=True, exist_ok=True)
        kept = set()
        for batch, values in boundary:
            flat = {f"{stream}/{name}": tensor for stream, named in values.items() for name, tensor in named.items()}
            kept.add(_boundary_name(number, batch))
            _write_tensors(self.folder / _boundary_name(number, batch), flat, {})
        processes.wait()
        if processes.writes:
            segment = f"segment-{number:04d}.safetensors"
            _write_solved(self.folder / segment, solved)
            segments = [*state.get("segments", ()), segment]
            text = json.dumps({"fingerprint": self.fingerprint, "stages": stages, "segments": segments}, indent=1)
            _write_bytes(self.folder / "run.json", text.encode())
        processes.wait()
        self.tidy(kept.union(*processes.others(kept)), processes)

    def tidy(self, kept: set[str], processes: Processes) -> None:
        """Remove boundaries but those that are `kept`, and what a killed run left half written."""
        if processes.writes:
            for path in [*self.folder.glob("boundary-*.safetensors"), *self.folder.glob("*.partial")]:
                if path.name not in kept:
                    path.unlink()
        processes.wait()

    def _state(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return {}
        try:
            state = json.loads(content)
            sound = isinstance(state["fingerprint"], str) and isinstance(state["stages"], int)
            sound = sound and all(isinstance(name, str) for name in state["segments"])
        except (ValueError, KeyError, TypeError):
            sound = False
        if not sound:
            raise _broken(path, "is not what a run writes")
        return dict(state)


def fingerprint(program: Program, passes: Sequence[str], settings: str, data: Sequence[Mapping[str, Tensor]]) -> str:
    """SHA-256 over all that decides the result: graph, weights as they are now (some elements of each), passes,
    settings, data, versions of qcompile and torch.
    """
    digest = hashlib.sha256()
    for text in (str(program), *passes, settings, qcompile.__version__, torch.__version__):
        digest.update(text.encode() + b"\0")
    for key in sorted(program.weights):
        digest.update(f"{key} {program.weights.meta(key)}".encode())
        digest.update(_bytes(program.weights.sample(key, _PEEK)))
    for batch in data:
        for name in sorted(batch):
            tensor = batch[name]
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode() + _bytes(tensor))
    return digest.hexdigest()


def _bytes(tensor: Tensor) -> bytes:
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""


def _boundary_name(number: int, batch: int) -> str:
    return f"boundary-{number:04d}-{batch:05d}.safetensors"


def _broken(path: Path, what: str) -> QCompileError:
    return QCompileError(f"{path} {what}; remove {path.parent} to begin again")


def _write_solved(path: Path, solved: Sequence[Sequence[Solved]]) -> None:
    tensors: dict[str, Tensor] = {}
    for stage, members in enumerate(solved):
        for worker, part in enumerate(members):
            tensors |= {f"{stage}/{worker}/{name}": tensor for name, tensor in part.tensors.items()}
    facts = [[part.facts for part in members] for members in solved]
    _write_tensors(path, tensors, {"facts": json.dumps(facts)})


def _read_solved(path: Path) -> list[list[Solved]]:
    tensors, about = _read_tensors(path)
    solved = [[Solved(facts=facts) for facts in members] for members in json.loads(about["facts"])]
    for key, tensor in tensors.items():
        stage, worker, name = key.split("/", 2)
        solved[int(stage)][int(worker)].tensors[name] = tensor
    return solved


def _write_tensors(path: Path, tensors: Mapping[str, Tensor], about: dict[str, str]) -> None:
    beside = path.with_suffix(".partial")
    own = {name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in tensors.items()}
    save_file(own, beside, {**about, "crc32": str(_checksum(own))})
    _settle(beside, path)


def _read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors by name, and what was written about them. Raises QCompileError for a file that is missing or broken."""
    if not path.is_file():
        raise _broken(path, "is missing")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a mapping
            about = dict(file.metadata() or {})
    except (SafetensorError, OSError):
        raise _broken(path, "cannot be read") from None
    if about.get("crc32") != str(_checksum(tensors)):
        raise _broken(path, "was changed since it was written")
    return tensors, about


def _checksum(tensors: Mapping[str, Tensor]) -> int:
    found = 0
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        flat = tensors[name].reshape(-1)
        found = zlib.crc32(flat.view(torch.uint8).numpy().data if flat.numel() else b"", found)
    return found


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
