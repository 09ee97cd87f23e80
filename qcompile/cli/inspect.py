"""`qcompile inspect`: what a model, an artifact or a program consists of."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from qcompile.artifact import Artifact
from qcompile.cli.show import console, print_json, size
from qcompile.cli.spaces import DEFAULT_PASSES
from qcompile.cli.spaces import check as check_spaces
from qcompile.cli.spaces import run as run_spaces
from qcompile.cli.subject import model_path, open_subject
from qcompile.compiled import CompiledModel
from qcompile.driver import run_passes
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.pass_manager import op_counts


@dataclass(frozen=True)
class Look:
    """What to show of a program, and after which passes."""

    text: bool = False
    spaces: bool = False
    passes: str | None = None
    level: str | None = None
    every: bool = False
    picture: Path | None = None

    def check(self) -> None:
        """Raises QCompileError for options that mean nothing together."""
        given = {"--level": self.level is not None, "--all": self.every, "--picture": self.picture is not None}
        alone = [option for option, is_given in given.items() if is_given]
        if alone and not self.spaces:
            raise QCompileError(f"{alone[0]} says how to show channel spaces; add --spaces")
        if self.text and self.spaces:
            raise QCompileError("--text prints a program and --spaces its channel spaces; keep one of them")
        check_spaces(self.level, self.picture)


def run(name: str | None, look: Look, specs: list[str], weights: str | None, as_json: bool) -> None:
    look.check()
    if specs or weights is not None:
        if look != Look(text=look.text):
            raise QCompileError("--spaces and --passes look at a program, --spec and --weights at tensors; keep one")
        _weights(name, look.text, specs, weights, as_json)
        return
    subject = open_subject(model_path(name))
    if isinstance(subject, Artifact):
        if look != Look():
            raise QCompileError(f"{name} is an exported artifact; give the model that it was made from")
        _artifact(subject, as_json)
        return
    program = subject.program if isinstance(subject, CompiledModel) else subject
    passes = look.passes if look.passes is not None else DEFAULT_PASSES if look.spaces else ""
    if passes:
        run_passes(program, passes)
    if look.spaces:
        run_spaces(program, look.level, look.every, look.picture, as_json)
    elif look.text:
        print(program)
    elif as_json:
        print_json(_facts(program))
    else:
        _program(program)


def _weights(name: str | None, text: bool, specs: list[str], weights: str | None, as_json: bool) -> None:
    if text:
        raise QCompileError("--text prints a program, and --spec and --weights look at tensors; keep one of them")
    if name is not None and weights is not None:
        raise QCompileError(f"{name} and --weights {weights} both say where the weights are; keep one of them")
    from qcompile.cli.weights import run as run_weights

    path = model_path(name) if weights is None else weights
    run_weights(path, weights or name or "zoo:llama", specs, as_json)


def _facts(program: Program) -> dict[str, Any]:
    return {
        "model": {k: v for k, v in program.info.items() if k != "config"},
        "inputs": {n.name: program.type_of(n) for n in program.inputs},
        "outputs": list(program.output_names),
        "weights": {program.key(n): program.type_of(n) for n in program.weight_nodes},
        "weight_bytes": sum(program.weights.nbytes(program.key(n)) for n in program.weight_nodes),
        "operators": dict(op_counts(program).most_common()),
    }


def _program(program: Program) -> None:
    from rich.table import Table

    facts, out = _facts(program), console()
    table = Table("", "", title="program", show_header=False)
    for key, value in facts["model"].items():
        table.add_row(key, str(value))
    table.add_row("weights", f"{len(facts['weights'])} tensors, {size(facts['weight_bytes'])}")
    table.add_row("inputs", "\n".join(f"{k}: {v}" for k, v in facts["inputs"].items()))
    table.add_row("outputs", ", ".join(facts["outputs"]))
    table.add_row("operators", ", ".join(f"{k} ×{v}" for k, v in facts["operators"].items()))
    out.print(table)


def _artifact(artifact: Artifact, as_json: bool) -> None:
    if as_json:
        print_json(artifact.manifest.model_dump())
        return
    from rich.table import Table

    manifest, out = artifact.manifest, console()
    table = Table("weight", "stored as", "spec", "bits", "SQNR dB", title=f"{artifact.main} ({size(manifest.bytes)})")
    for name, entry in manifest.tensors.items():
        sqnr = "" if entry.sqnr_db is None else f"{entry.sqnr_db:.1f}"
        table.add_row(name, entry.container, entry.spec or "", f"{entry.bits_per_element:.2f}", sqnr)
    out.print(table)
