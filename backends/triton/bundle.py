"""`bundle.json`: what a bundle holds beside its graph, and what a launcher must know of every binary.

graph.qir                                        the graph: a version line, then text of the IR
weights/segment-000.safetensors …                tensors of the graph, a file a segment of the model
kernels/<kernel>/<gpu>/<config>.cubin|.hsaco     binaries; beside a cubin its .ptx
kernels/sources/*.py                             the kernels, for GPUs without a binary
choices.json                                     configurations that `qcompile tune` measured to be best
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, TypeVar

from pydantic import BaseModel, ConfigDict

from qcompile.backends.triton.launch import Variant
from qcompile.backends.triton.storing import PackedWeight
from qcompile.errors import ArtifactError
from qcompile.manifest import read_versioned

BUNDLE, GRAPH, CHOICES, SOURCES = "bundle.json", "graph.qir", "choices.json", "kernels/sources"
FORMAT = 1


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class WeightEntry(_Strict):
    """Where the codes of a weight lie; see `storing.PackedWeight`."""

    format: str
    planes: tuple[str, ...]
    start: int
    stop: int
    transposed: bool = False
    stacked: int = 0

    def packed(self, name: str) -> PackedWeight:
        return PackedWeight(
            name, self.format, self.planes, self.planes, self.start, self.stop, 0, self.transposed, self.stacked
        )


class ArgumentEntry(_Strict):
    """One argument of a kernel: Triton's type (``*fp16``, ``i32``), and whether it must be a multiple of 16."""

    name: str
    type: str
    aligned: bool


class BinaryEntry(_Strict):
    """A kernel for one GPU, and what a launch must say.

    Pass the arguments in order, then `hidden` null pointers; a program has `threads` threads and `shared` bytes of
    shared memory (more than 48 KB must be asked for with cuFuncSetAttribute). `registers` and `spilled` (bytes) are a
    thread's; `occupancy` is the estimated share of a multiprocessor's threads.
    """

    file: str
    sha256: str
    symbol: str
    threads: int
    shared: int
    hidden: int
    registers: int
    spilled: int
    occupancy: float


class KernelEntry(_Strict):
    """One compiled variant of a kernel."""

    kernel: str
    config: str
    arguments: tuple[ArgumentEntry, ...]
    constants: dict[str, int | float | bool | str]
    warps: int
    stages: int
    binaries: dict[str, BinaryEntry]
    left_out: dict[str, str] = {}  # GPU → why it has none

    def variant(self) -> Variant:
        """What a launch looks it up by."""
        signature = tuple((a.name, a.type, a.aligned) for a in self.arguments)
        return Variant(self.kernel, signature, tuple(self.constants.items()), self.warps, self.stages)


class Bundle(_Strict):
    """The whole table."""

    format: Literal[1] = 1
    triton: str | None
    gpus: tuple[str, ...]
    shards: dict[str, tuple[str, ...]]  # file → keys of its tensors
    weights: dict[str, WeightEntry]
    kernels: dict[str, KernelEntry]  # by the variant's key
    sites: dict[str, dict[str, tuple[str, ...]]]  # site → GPU → labels of the configurations that have binaries
    sources: dict[str, str]  # file → sha256

    def write(self, directory: Path) -> None:
        """Write `bundle.json`."""
        (directory / BUNDLE).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Bundle:
        """Read a directory's `bundle.json`. Raises ArtifactError where it is missing, of a newer format or damaged."""
        return read_json(directory / BUNDLE, cls)


class Choices(_Strict):
    """What tuning found: GPU → site → label of the configuration, with the microseconds measured."""

    format: Literal[1] = 1
    gpus: dict[str, dict[str, tuple[str, float]]] = {}

    def write(self, directory: Path) -> None:
        """Write `choices.json`."""
        (directory / CHOICES).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")


M = TypeVar("M", bound=BaseModel)


def read_json(path: Path, model: type[M]) -> M:
    """Read a file of a bundle; ArtifactError where it is missing, of a newer format or damaged."""
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: give a directory exported with --target triton")
    return read_versioned(path, model, FORMAT)


def write_graph(text: str, directory: Path) -> None:
    """Write the graph behind a line that says its version."""
    (directory / GRAPH).write_text(f"# qcompile graph {FORMAT}\n{text}\n")


def read_graph(directory: Path) -> str:
    """The text of a graph. Raises ArtifactError where it is missing or of a newer version."""
    path = directory / GRAPH
    if not path.is_file():
        raise ArtifactError(f"{path} is missing: give a directory exported with --target triton")
    head, _, body = path.read_text().partition("\n")
    words = head.split()
    if words[:3] != ["#", "qcompile", "graph"] or len(words) != 4 or not words[3].isdigit():
        raise ArtifactError(f"{path} does not begin with its version; export the artifact again")
    if int(words[3]) > FORMAT:
        raise ArtifactError(f"{path} has version {words[3]}, this qcompile reads up to {FORMAT}; upgrade qcompile")
    return body


def digest(data: bytes) -> str:
    """SHA-256, hexadecimal."""
    return hashlib.sha256(data).hexdigest()
