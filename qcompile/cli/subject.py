"""What a MODEL, PROGRAM or ARTIFACT argument names."""

from __future__ import annotations

from pathlib import Path

from qcompile.artifact import Artifact
from qcompile.capture import capture
from qcompile.compiled import CompiledModel, load
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.manifest import MANIFEST, Manifest


def model_path(name: str | None) -> str:
    """The directory that a MODEL argument names: ``zoo:opt`` and nothing at all stand for the embedded models."""
    from qcompile import zoo

    if name is None:
        return str(zoo.path("llama"))
    if name.startswith("zoo:"):
        try:
            return str(zoo.path(name.removeprefix("zoo:")))
        except ValueError as error:
            raise QCompileError(str(error)) from None
    return name


def open_program(name: str | None) -> Program:
    """The program that an argument names: IR text, a saved model's, or a captured model's."""
    path = Path(model_path(name))
    if path.suffix == ".qir" and path.is_file():
        return Program.parse(path.read_text())
    if (path / MANIFEST).is_file() and Manifest.read(path).kind == "model":
        return load(path).program
    if (path / MANIFEST).is_file():
        raise QCompileError(f"{path} is an exported artifact; give the model that it was made from")
    return capture(str(path))


def open_subject(name: str) -> Artifact | CompiledModel | Program:
    """An artifact, a saved model, or a program."""
    path = Path(model_path(name))
    if (path / MANIFEST).is_file():
        return Artifact.open(path) if Manifest.read(path).kind == "artifact" else load(path)
    return open_program(name)
