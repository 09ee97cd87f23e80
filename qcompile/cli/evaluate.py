"""`qcompile eval`: perplexity, KL and agreement of a model or an artifact."""

from __future__ import annotations

from typing import Any

from qcompile.artifact import Artifact
from qcompile.cli.show import console, print_json
from qcompile.cli.subject import open_program, open_subject
from qcompile.compiled import CompiledModel
from qcompile.data import load_passages
from qcompile.errors import QCompileError
from qcompile.evaluate import evaluate
from qcompile.ir.program import Program


def run(
    name: str,
    against: str | None,
    data: str | None,
    field: str | None,
    limit: int,
    length: int | None,
    documents: bool,
    as_json: bool,
) -> None:
    subject = open_subject(name)
    reference, info = _reference(subject, against), _info(subject)
    source = reference or (subject if isinstance(subject, Program) else None)
    if source is None and data is None:
        raise QCompileError(f"{name}: text is written by the original, which is not at hand; give --against or --data")
    context = int(info.get("max_positions") or 512)
    passages = load_passages(
        data or "generated",
        info.get("tokenizer"),
        length=min(length or context, context),
        mode="documents" if documents else "strided",
        limit=limit,
        program=source,
        field=field,
    )
    result = evaluate(subject, reference, data=passages)
    if as_json:
        print_json({"model": name, "against": against, **result.to_dict()})
    else:
        console().print(result)


def _reference(subject: Artifact | CompiledModel | Program, against: str | None) -> Program | None:
    if against is not None:
        return open_program(against)
    source = _info(subject).get("source")
    if isinstance(subject, Artifact | CompiledModel) and isinstance(source, str):
        try:
            return open_program(source)
        except QCompileError:
            return None  # the original has moved; perplexity can be had without it
    return None


def _info(subject: Artifact | CompiledModel | Program) -> dict[str, Any]:
    return subject.program.info if isinstance(subject, CompiledModel) else subject.info
