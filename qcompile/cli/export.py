"""`qcompile export`: model and recipe in, checked artifact out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from qcompile.artifact import Artifact
from qcompile.atomic import check_target
from qcompile.backend_base import make_backend
from qcompile.calibration.processes import first_process
from qcompile.cli.show import console, print_json, size, status, working
from qcompile.cli.subject import model_path
from qcompile.compiled import CompiledModel
from qcompile.data import load_passages
from qcompile.driver import compile as compile_model
from qcompile.errors import QCompileError, RecipeError
from qcompile.evaluate import Evaluation, evaluate
from qcompile.recipe import Recipe

DEFAULT_TARGET = "onnx_qcdq"
EVALUATION_LENGTH, EVALUATION_SAMPLES = 128, 32  # tokens a sequence, sequences


def run(
    model: str | None,
    target: str | None,
    recipe: str,
    out: Path | None,
    settings: list[str],
    options: list[str],
    named: Mapping[str, str | None],
    data: str | None,
    resume: Path | None,
    measure: bool,
    as_json: bool,
) -> None:
    path = model_path(model)
    chosen = Recipe.load(recipe).override(settings)
    target, made = target or chosen.target or DEFAULT_TARGET, parse_options(options)
    made |= {name: value for name, value in named.items() if value is not None}
    make_backend(target, made).require()  # bad options and missing packages are said before any work is done
    out = out or Path("qcompile-out") / f"{Path(path).name}-{Path(recipe).stem}-{target}"
    if not first_process():  # under torchrun: it calibrates with the first one, which does the rest
        compile_model(path, chosen, data, resume=resume)
        return
    check_target(out.absolute())
    status(f"capturing and compiling {path} with recipe {recipe}")
    compiled = compile_model(path, chosen, data, resume=resume)
    with working(f"lowering to {target}, running and comparing"):
        artifact = compiled.export(target, out, made)
    figures = _evaluate(compiled, artifact, data) if measure else None
    if as_json:
        print_json(
            {
                "artifact": str(artifact.directory),
                "manifest": artifact.manifest.model_dump(),
                "evaluation": figures and figures.to_dict(),
            }
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


def _evaluate(compiled: CompiledModel, artifact: Artifact, data: str | None) -> Evaluation:
    """Perplexity of the original and of the artifact in its own runtime, and the KL between them."""
    reference = compiled.reference
    if reference is None or "input_ids" not in {n.name for n in reference.inputs}:
        raise QCompileError("only language models can be evaluated; export with --no-evaluate")
    length = min(EVALUATION_LENGTH, int(reference.info.get("max_positions") or EVALUATION_LENGTH))
    source, field = data or "generated", compiled.recipe.calibration.field
    passages = load_passages(source, length=length, limit=EVALUATION_SAMPLES, program=reference, field=field)
    return evaluate(artifact, reference, data=passages)


def _print(compiled: CompiledModel, artifact: Artifact, figures: Evaluation | None) -> None:
    from rich.table import Table

    out, manifest = console(), artifact.manifest
    out.print(compiled.report.table())
    for note in compiled.report.notes:
        out.print(note, markup=False)
    for pass_name, entry in compiled.report.skipped():
        out.print(f"left alone by {pass_name}: {entry.where}: {entry.what}")
    table = Table(title="artifact", show_header=False, title_justify="left")
    table.add_row("artifact", str(_near(artifact.main)))
    table.add_row("size", f"{size(manifest.bytes)}; weights as float32 {size(manifest.float32_bytes)}")
    table.add_row(
        "bits per weight", f"{manifest.bits_per_weight:.2f}; quantized layers {manifest.quantized_bits_per_weight:.2f}"
    )
    if figures is not None and figures.kl is not None and figures.top1 is not None:
        table.add_row("perplexity", f"{figures.reference_perplexity:.4f} before, {figures.perplexity:.4f} after")
        table.add_row(
            "KL to the original", f"{figures.kl} nats per token; same likeliest token {figures.top1.mean:.1%}"
        )
        table.add_row("measured on", f"{figures.data}, in {artifact.backend.runtime}")
    if (agreement := manifest.agreement) is not None:
        same = f"max |Δlogit| / max |logit| = {agreement.max_relative_error:.1e} (tolerance {agreement.tolerance:.0e})"
        table.add_row(f"{agreement.runtime} agrees", f"{same}; same top token {agreement.top1:.1%}")
    table.add_row("next", f"qcompile run {_near(artifact.directory)} --prompt '…'")
    out.print(table)


def _near(path: Path) -> Path:
    """Relative to where the user is, if it is below."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path
