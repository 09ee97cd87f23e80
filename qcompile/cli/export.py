"""`qcompile export`: model and recipe in, checked artifact out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from qcompile.artifact import Artifact
from qcompile.atomic import check_target
from qcompile.backend_base import make_backend
from qcompile.cli.show import console, print_json, size, status
from qcompile.cli.subject import model_path
from qcompile.compiled import CompiledModel
from qcompile.driver import compile as compile_model
from qcompile.errors import QCompileError, RecipeError
from qcompile.recipe import Recipe


def run(
    model: str | None,
    target: str,
    recipe: str,
    out: Path | None,
    settings: list[str],
    options: list[str],
    data: str | None,
    evaluate: bool,
    as_json: bool,
) -> None:
    path = model_path(model)
    chosen = Recipe.load(recipe).override(settings)
    made = parse_options(options)
    make_backend(target, made)  # bad options are said before any work is done
    out = out or Path("qcompile-out") / f"{Path(path).name}-{Path(recipe).stem}-{target}"
    check_target(out.absolute())
    status(f"capturing and compiling {path} with recipe {recipe}")
    compiled = compile_model(path, chosen, data)
    status(f"lowering to {target}, running and comparing")
    artifact = compiled.export(target, out, made)
    figures = _evaluate(compiled, artifact, data) if evaluate else {}
    if as_json:
        print_json(
            {"artifact": str(artifact.directory), "manifest": artifact.manifest.model_dump(), "evaluation": figures}
        )
    else:
        _print(compiled, artifact, figures)


def parse_options(options: list[str]) -> dict[str, Any]:
    """NAME=VALUE pairs; values are YAML."""
    made = {}
    for option in options:
        name, equals, value = option.partition("=")
        if not equals:
            raise RecipeError(f"option {option!r} is not written like NAME=VALUE")
        made[name.strip()] = yaml.safe_load(value)
    return made


def _evaluate(compiled: CompiledModel, artifact: Artifact, data: str | None) -> dict[str, Any]:
    """Perplexity of the original and of the artifact in its own runtime, and the KL between them."""
    from qcompile.data import load_batches
    from qcompile.evaluate import evaluate

    reference = compiled.reference
    if reference is None or "input_ids" not in {n.name for n in reference.inputs}:
        raise QCompileError("only language models can be evaluated; export with --no-evaluate")
    length = min(128, int(reference.info.get("max_positions") or 128))
    batches = load_batches(
        data or "generated", reference.info.get("tokenizer"), samples=16, length=length, seed=1, program=reference
    )
    with reference.weights.caching():
        before = evaluate(reference, data=batches)
        after = evaluate(artifact, reference, data=batches)
    return {"before": before.to_dict(), "after": after.to_dict()}


def _print(compiled: CompiledModel, artifact: Artifact, figures: dict[str, Any]) -> None:
    from rich.table import Table

    out, manifest = console(), artifact.manifest
    out.print(compiled.report.table())
    for pass_name, entry in compiled.report.skipped():
        out.print(f"left alone by {pass_name}: {entry.where}: {entry.what}")
    table = Table(title=str(artifact.directory), show_header=False, title_justify="left")
    table.add_row("artifact", str(artifact.main))
    table.add_row("size", f"{size(manifest.bytes)}; weights as float32 {size(manifest.float32_bytes)}")
    table.add_row(
        "bits per weight", f"{manifest.bits_per_weight:.2f}; quantized layers {manifest.quantized_bits_per_weight:.2f}"
    )
    if figures:
        before, after = figures["before"], figures["after"]
        table.add_row("perplexity", f"{before['perplexity']:.4f} before, {after['perplexity']:.4f} after")
        table.add_row("KL to the original", f"{after['kl']:.5f} nats per token; top-1 agreement {after['top1']:.1%}")
    if (agreement := manifest.agreement) is not None:
        same = f"max |Δlogit| / max |logit| = {agreement.max_relative_error:.1e} (tolerance {agreement.tolerance:.0e})"
        table.add_row(f"{agreement.runtime} agrees", f"{same}; same top token {agreement.top1:.1%}")
    table.add_row("next", f"qcompile run {artifact.directory} --prompt '…'")
    out.print(table)
