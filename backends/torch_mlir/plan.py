"""`plan.json`: which modules an artifact has, what each takes and returns, and where every weight lies."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, ValidationError

from qcompile.errors import ArtifactError

PLAN = "plan.json"
MAIN, PREFILL, DECODE = "main", "prefill", "decode"
"""Names of functions: one for any sizes, called prefill in a decoder, which has another for one token."""


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Piece(_Strict):
    """A part of a weight's codes, `key` in `file`: the `runs` of indices along `axis`; all, where that is None."""

    file: str
    key: str
    axis: int | None = None
    runs: list[tuple[int, int]] = []


class Codes(_Strict):
    """How codes lie in the files; `shape` is theirs there, unpacked, `transposed` if it is not the program's."""

    bits: int
    signed: bool
    shape: list[int]
    transposed: bool
    offset: bool = False  # half the range was added to signed codes
    pieces: list[Piece]


class Module(_Strict):
    """One module. Its functions take `inputs` and return `outputs`, values of the program by name.

    `mlir` and `vmfb` (None where it was not compiled) are files, shared by modules that are alike; `parameters` says in
    which file each scope is found, `devices` how many it runs on.
    """

    mlir: str
    vmfb: str | None
    parameters: dict[str, str]
    devices: int
    inputs: list[str]
    outputs: list[str]
    functions: list[str]
    weights: list[str] = []  # keys of those that are arguments, behind the inputs


class Plan(_Strict):
    """What a runner reads."""

    format: Literal[1] = 1
    modules: list[Module]
    codes: dict[str, Codes]
    cpu: str
    cpu_features: list[str] = []

    def write(self, directory: Path) -> None:
        """Write `plan.json` into `directory`."""
        (directory / PLAN).write_text(json.dumps(self.model_dump(mode="json"), indent=1) + "\n")

    @classmethod
    def read(cls, directory: Path) -> Plan:
        """Read a directory's plan. Raises ArtifactError where it is missing or malformed."""
        path = directory / PLAN
        if not path.is_file():
            raise ArtifactError(f"{directory} has no {PLAN}; give a directory exported with --target torch_mlir")
        try:
            return cls.model_validate_json(path.read_text())
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise ArtifactError(f"{path}: {where}: {first['msg']}; export the artifact again") from None
