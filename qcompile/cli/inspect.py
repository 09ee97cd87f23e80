"""`qcompile inspect`: what a model, an artifact or a program consists of."""

from __future__ import annotations

from typing import Any

from qcompile.artifact import Artifact
from qcompile.cli.show import console, print_json, size
from qcompile.cli.subject import model_path, open_subject
from qcompile.compiled import CompiledModel
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.pass_manager import op_counts


def run(name: str | None, text: bool, specs: list[str], weights: str | None, as_json: bool) -> None:
    if specs or weights is not None:
        _weights(name, text, specs, weights, as_json)
        return
    subject = open_subject(model_path(name))
    if isinstance(subject, Artifact):
        _artifact(subject, as_json)
        return
    program = subject.program if isinstance(subject, CompiledModel) else subject
    if text:
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
