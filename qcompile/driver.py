"""`compile` and `run_passes`: the pipeline from a model and a recipe to a compiled model."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from qcompile.calibration.settings import Settings
from qcompile.capture import capture
from qcompile.data.batches import Batch, Batches, InputBatches
from qcompile.drift import Drift
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.pass_base import CalibratedPass, Pass, Report, parse_pipeline
from qcompile.pass_manager import Instrument, PassManager
from qcompile.recipe import Recipe, pipeline, resolve
from qcompile.recipe.model import Calibration
from qcompile.report import CompileReport

if TYPE_CHECKING:
    from qcompile.compiled import CompiledModel

CHECK_EACH_BELOW = 2 << 30
"""Bytes of weights, counted as float32, beyond which ``verify: auto`` checks at the end of preserving passes only."""

# Largest drift that a function-preserving pass may cause, by the type computed in: max |Δ| / max |before|. In half
# precision it is what rounding every weight of a 32-layer decoder anew was seen to move the logits by.
_TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def compile(
    model: Any,
    recipe: str | Path | Mapping[str, Any] | Recipe = "int4-g128",
    data: Any = None,
    *,
    overrides: Sequence[str] = (),
    instruments: Sequence[Instrument] = (),
    resume: str | Path | None = None,
) -> CompiledModel:
    """Compile a model by a recipe.

    Args:
        model: an HF directory or hub id, a ``torch.nn.Module`` of transformers, an ``ExportedProgram``, a ``.pt2``
            file, a directory that qcompile saved, or a `Program`.
        recipe: a preset's name, a YAML file, a mapping, or a `Recipe`.
        data: calibration data in place of the recipe's (a text file, a token tensor, an iterable of texts, tokens or
            mappings of the model's inputs; see docs/data.md).
        overrides: like ``["weights.group=64", "activations=null"]``, applied to the recipe.
        instruments: look on while passes run.
        resume: a folder where finished segments are kept while weights are rounded. The same call with the same folder
            goes on behind the last of them, and gives the same bits.

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
    batches = calibration_data(passes, chosen.calibration, data, reference)
    watch = [*instruments, *_drift(program, chosen, passes)]
    folder = None if resume is None else Path(resume)
    manager = PassManager(passes, watch, batches, settings=chosen.calibration.settings(), resume=folder)
    reports = manager.run(program)
    notes = (*program.info.get("notes", ()), *_calibrated_on(batches, chosen.calibration))
    report = CompileReport(plan, reports, notes, time.perf_counter() - start)
    return CompiledModel(program, chosen, report, reference)


def run_passes(
    program: Program,
    passes: str | Iterable[Pass],
    data: Iterable[Batch] | None = None,
    *,
    settings: Settings | None = None,
    resume: str | Path | None = None,
) -> list[Report]:
    """Run passes on a program, in place: ``run_passes(program, "raise-norms, insert-qdq(weights=int4 sym), rtn")``.

    Args:
        passes: a comma-separated list as a recipe spells it, or passes.
        data: batches for passes that need calibration: tokens ``[batch, sequence]``, or inputs by name.
        settings: how those that work segment by segment are run.
        resume: see `compile`.

    Returns one report a pass. Raises QCompileError for a pass or an option that does not exist.
    """
    made = parse_pipeline(passes) if isinstance(passes, str) else list(passes)
    folder = None if resume is None else Path(resume)
    return PassManager(made, batches=data, settings=settings or Settings(), resume=folder).run(program)


def check_feeds(program: Program) -> dict[str, Tensor]:
    """Small fixed inputs to check a pass on: two seeded random prompts of eight tokens, one for a large model."""
    random = torch.Generator().manual_seed(0)
    if "input_ids" in {n.name for n in program.inputs}:
        vocabulary = int(program.info.get("vocab_size") or 2)
        prompts = torch.randint(0, vocabulary, (2, 8), generator=random)
        return fill(program, {"input_ids": prompts[:1] if _large(program) else prompts})
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
    large = _large(program)
    once = recipe.verify == "end" or (recipe.verify == "auto" and large)
    # Once after each run of preserving passes, not after every one of them.
    last = [i for i, p in enumerate(passes) if p.preserves_function]
    ends = frozenset(i for i in last if i + 1 not in last) if once else None
    says = (
        f"compared on a prompt of 8 tokens, {_float32_bytes(program) / 1e9:.1f} GB of weights in float32 read each time"
    )
    return [Drift(check_feeds(program), _tolerance(program), True, ends, says if large else "")]


def _tolerance(program: Program) -> float:
    """That of the coarsest type the program computes in: a float64 model may well normalize in float32."""
    values = [node.meta["val"] for node in program.graph.nodes if node.op != "output"]
    known = [_TOLERANCE[v.dtype] for v in values if isinstance(v, Tensor) and v.dtype in _TOLERANCE]
    return max(known, default=_TOLERANCE[torch.float32])


def _large(program: Program) -> bool:
    return _float32_bytes(program) > CHECK_EACH_BELOW


def _float32_bytes(program: Program) -> int:
    metas = [program.weights.meta(key) for key in program.weights]
    return sum(4 * math.prod(shape) for shape, _ in metas)


def calibration_data(
    passes: Sequence[Pass], settings: Calibration, data: Any, program: Program
) -> Batches | InputBatches | None:
    """What the passes that look at data are to see, or None where there are none.

    Args:
        settings: a recipe's; sequences are no longer than the model's positions.
        data: read in place of what the settings name, where it is not None.
        program: writes the text, where that is asked for; the data must have its inputs.

    Raises QCompileError for data that cannot be read, or that is not what the program takes.
    """
    if not any(isinstance(p, CalibratedPass) for p in passes):
        return None
    from qcompile.data import load_inputs

    chosen, inputs = (settings.data if data is None else data), [n.name for n in program.inputs]
    if "input_ids" not in inputs and (isinstance(chosen, str | Path) or hasattr(chosen, "shape")):
        raise QCompileError(f"the program takes {inputs}, not input_ids: give data= with mappings of its inputs")
    return load_inputs(
        chosen,
        program,
        settings.samples,
        min(settings.length, int(program.info.get("max_positions") or settings.length)),
        settings.seed,
        settings.batch,
        settings.bos,
        settings.packing,
        settings.field,
    )


def _calibrated_on(batches: Batches | InputBatches | None, settings: Calibration) -> list[str]:
    """A line for the report."""
    if batches is None:
        return []
    cut = isinstance(batches, Batches) and batches.length < settings.length
    return [f"calibrated on {batches.describe()}" + (f", not {settings.length}: the model has no more positions" * cut)]
