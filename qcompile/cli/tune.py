"""`qcompile tune`: let an artifact's target measure what it can choose between, on this machine."""

from __future__ import annotations

from pathlib import Path

from qcompile.artifact import Artifact
from qcompile.cli.show import console, print_json


def run(directory: Path, as_json: bool) -> None:
    artifact = Artifact.open(directory)
    chosen = artifact.backend.tune(artifact.directory)
    if as_json:
        print_json({"artifact": str(directory), "chosen": chosen})
        return
    for line in chosen:
        console().print(line, markup=False)
    console().print(f"{len(chosen)} choices written to {directory}", markup=False)
