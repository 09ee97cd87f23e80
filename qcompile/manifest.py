"""`manifest.json`: what an artifact is, what made it, and what its bytes must be."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from qcompile.errors import ArtifactError

MANIFEST = "manifest.json"
FORMAT = 1
M = TypeVar("M", bound=BaseModel)


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class FileEntry(_Strict):
    """One file of the artifact."""

    bytes: int
    sha256: str


class AccumulatorEntry(_Strict):
    """What the codes of a weight sum up to at worst, over `tile` products with codes from `input_min` to `input_max`.

    Counted exactly from the codes. `holds`: nothing leaves -`limit` … `limit`, what an accumulator of `bits` holds.
    """

    bits: int
    tile: int
    input_min: int
    input_max: int
    highest: int
    lowest: int
    limit: int
    holds: bool


class TensorEntry(_Strict):
    """One weight of the artifact."""

    container: str
    elements: int
    bytes: int
    bits_per_element: float
    spec: str | None = None
    sqnr_db: float | None = None
    codes_sha256: str | None = None
    accumulator: AccumulatorEntry | None = None


class InputEntry(_Strict):
    """One input: sizes that vary are None."""

    dtype: str
    sizes: list[int | None]


class Agreement(_Strict):
    """How near the artifact, run in its runtime, comes to the Program on the reference prompts."""

    runtime: str
    max_relative_error: float
    top1: float
    tolerance: float
    prompts: list[int]


class Manifest(_Strict):
    """Everything that is known of an artifact directory."""

    format: Literal[1] = 1
    qcompile: str
    kind: Literal["artifact", "model"]
    target: str | None = None
    target_options: dict[str, Any] = {}
    main: str
    model: dict[str, Any]
    recipe: dict[str, Any]
    versions: dict[str, str]
    inputs: dict[str, InputEntry]
    outputs: list[str]
    tensors: dict[str, TensorEntry]
    bits_per_weight: float
    quantized_bits_per_weight: float | None
    bytes: int
    float32_bytes: int
    agreement: Agreement | None = None
    notes: list[str] = []
    build: dict[str, Any] = {}
    files: dict[str, FileEntry]

    def write(self, directory: Path) -> None:
        """Write `manifest.json` into `directory`."""
        text = json.dumps(self.model_dump(mode="json"), indent=1)
        (directory / MANIFEST).write_text(text + "\n")

    @classmethod
    def read(cls, directory: str | Path) -> Manifest:
        """Read a directory's manifest.

        Raises ArtifactError where it is missing, no JSON, of a newer format, or lacks a field.
        """
        path = Path(directory) / MANIFEST
        if not path.is_file():
            raise ArtifactError(
                f"{directory} has no {MANIFEST}: it is no qcompile artifact; give the exported directory"
            )
        return read_versioned(path, cls, FORMAT)

    def check_files(self, directory: str | Path) -> None:
        """Raise ArtifactError naming the first file that is missing, truncated or changed."""
        for name, entry in self.files.items():
            path = Path(directory) / name
            if not path.is_file():
                raise ArtifactError(f"{path} is missing; export the artifact again")
            if (size := path.stat().st_size) != entry.bytes:
                raise ArtifactError(f"{path} has {size} bytes, the manifest says {entry.bytes}; export it again")
            if file_hash(path) != entry.sha256:
                raise ArtifactError(f"{path} was changed after it was written (its hash differs); export it again")


def read_versioned(path: Path, model: type[M], newest: int) -> M:
    """Read a JSON file that says its `format`; ArtifactError where it is damaged or above the `newest` known."""
    try:
        data: Any = json.loads(path.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ArtifactError(f"{path} is not JSON ({error}); export the artifact again") from None
    version = data.get("format") if isinstance(data, dict) else None
    if isinstance(version, int) and version > newest:
        raise ArtifactError(f"{path} has format {version}, this qcompile reads up to {newest}; upgrade qcompile")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise ArtifactError(f"{path}: {where}: {first['msg']}; export the artifact again") from None


def describe_files(directory: Path) -> dict[str, FileEntry]:
    """Size and hash of every file in `directory` but the manifest, by relative name."""
    paths = sorted(p for p in directory.rglob("*") if p.is_file() and p.name != MANIFEST)
    return {p.relative_to(directory).as_posix(): FileEntry(bytes=p.stat().st_size, sha256=file_hash(p)) for p in paths}


def file_hash(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
