"""`compile` and `run_passes`: the pipeline from a model and a recipe to a compiled model."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompile.capture import capture
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.pass_base import CalibratedPass, Pass, Report, parse_pipeline
from qcompile.pass_manager import Drift, Instrument, PassManager
from qcompile.recipe import Recipe, pipeline, resolve
from qcompile.report import CompileReport

if TYPE_CHECKING:
    from qcompile.compiled import CompiledModel

# Largest drift that a function-preserving pass may cause, by the model's dtype: max |Δ| / max |before|.
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def compile(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = "int4-g128",
    data: Any = None,
    *,
    overrides: Sequence[str] = (),
    instruments: Sequence[Instrument] = (),
) -> CompiledModel:
    """Compile a model by a recipe.

    Args:
        model: an HF directory or hub id, a ``torch.nn.Module`` of transformers, an ``ExportedProgram``, a ``.pt2``
            file, a directory that qcompile saved, or a `Program`.
        recipe: a preset's name, a YAML file, a mapping, or a `Recipe`.
        data: calibration data in place of the recipe's (a text file, a token tensor, an iterable; see docs/data.md).
        overrides: like ``["weights.group=64", "activations=null"]``, applied to the recipe.
        instruments: look on while passes run.

    Raises:
        QCompileError: with one line that says what is wrong and what to do.
    """
    from qcompile.compiled import CompiledModel

    start = time.perf_counter()
    chosen = Recipe.load(recipe).override(list(overrides))
    program = model.clone() if isinstance(model, Program) else capture(model)
    reference = program.clone()
    plan = resolve(program, chosen)
    passes = pipeline(chosen)
    batches = _batches(passes, chosen, data, reference)
    watch = [*instruments, *_drift(program, chosen, passes)]
    reports = PassManager(passes, watch, batches).run(program)
    report = CompileReport(plan, reports, tuple(program.info.get("notes", ())), time.perf_counter() - start)
    return CompiledModel(program, chosen, report, reference)


def run_passes(program: Program, passes: str | Iterable[Pass], data: Iterable[Tensor] | None = None) -> list[Report]:
    """Run passes on a program, in place: ``run_passes(program, "raise-norms, insert-qdq(weights=int4 sym), rtn")``.

    Args:
        passes: a comma-separated list as a recipe spells it, or passes.
        data: token batches ``[batch, sequence]`` for passes that need calibration.

    Returns one report a pass. Raises QCompileError for a pass or an option that does not exist.
    """
    made = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
    return PassManager(made, batches=data).run(program)


def check_feeds(program: Program) -> dict[str, Tensor]:
    """Small fixed inputs to check a pass on: two seeded random prompts of eight tokens."""
    random = torch.Generator().manual_seed(0)
    if "input_ids" in {n.name for n in program.inputs}:
        vocabulary = int(program.info.get("vocab_size") or 2)
        return fill(program, {"input_ids": torch.randint(0, vocabulary, (2, 8), generator=random)})
    feeds = {}
    for node in program.inputs:
        fake = node.meta["val"]
        sizes = [d if isinstance(d, int) else 2 for d in fake.shape]
        if fake.dtype.is_floating_point:
            feeds[node.name] = torch.randn(sizes, generator=random, dtype=torch.float32).to(fake.dtype)
        else:
            feeds[node.name] = torch.ones(sizes, dtype=fake.dtype)
    return feeds


def _drift(program: Program, recipe: Recipe, passes: Sequence[Pass]) -> list[Instrument]:
    """The self-check that the recipe asks for: function-preserving passes must keep the outputs."""
    if recipe.verify == "off":
        return []
    floats = {n.meta["val"].dtype for n in program.weight_nodes if n.meta["val"].dtype.is_floating_point}
    tolerance = max((_TOLERANCE.get(d, 1e-4) for d in floats), default=1e-4)
    # "end": once after each run of preserving passes, not after every one of them.
    last = [i for i, p in enumerate(passes) if p.preserves_function]
    ends = frozenset(i for i in last if i + 1 not in last) if recipe.verify == "end" else None
    return [Drift(check_feeds(program), tolerance, only_preserving=True, at=ends)]


def _batches(passes: Sequence[Pass], recipe: Recipe, data: Any, reference: Program) -> Iterable[Tensor] | None:
    if not any(isinstance(p, CalibratedPass) for p in passes):
        return None
    from qcompile.data import load_batches

    chosen, settings = (recipe.calibration.data if data is None else data), recipe.calibration
    tokenizer = reference.info.get("tokenizer")
    if "input_ids" not in {n.name for n in reference.inputs}:
        raise QCompileError("calibration needs a program that reads input_ids; run the passes yourself with run_passes")
    length = min(settings.length, int(reference.info.get("max_positions") or settings.length))
    return load_batches(
        chosen, tokenizer, settings.samples, length, settings.seed, batch=settings.batch, program=reference
    )
