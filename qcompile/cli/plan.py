"""`qcompile plan`: what a recipe would do, layer by layer, before anything is computed."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from qcompile.backend_base import make_backend
from qcompile.calibration.engine import Engine
from qcompile.calibration.estimate import Estimate, estimate
from qcompile.calibration.processes import Processes
from qcompile.calibration.worker import SegmentPass, Setup
from qcompile.cli.show import console, print_json, size
from qcompile.cli.subject import open_program
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Pass
from qcompile.pass_manager import together
from qcompile.passes.quantize.plain import without_rounding
from qcompile.recipe import Recipe, pipeline, resolve
from qcompile.recipe.model import Calibration
from qcompile.recipe.values import VALUE_PASSES

_QUICK = ("raise-norms", "insert-qdq", *VALUE_PASSES.values())
"""Passes that read no weight, and that calibration needs to have run; others hardly change what it takes."""


def run(model: str | None, recipe: str, settings: list[str], target: str | None, as_json: bool) -> None:
    chosen = Recipe.load(recipe).override(settings)
    program = open_program(model)
    plan = resolve(program, chosen)
    made = pipeline(chosen)
    passes = [str(p) for p in made]
    target = target or chosen.target
    obstacles = [str(o) for o in make_backend(target).obstacles(program)] if target else []
    estimates, notes = estimates_of(program, made, chosen.calibration)
    if as_json:
        taken = {name: found.to_dict() for name, found in estimates.items()}
        plain = {"plan": plan.to_dict(), "passes": passes, "obstacles": obstacles}
        print_json({**plain, "calibration": {"estimates": taken, "notes": notes}})
        return
    out = console()
    out.print(plan.table())
    out.print(f"size {size(plan.bytes_before)} before, {size(plan.bytes_after)} after", style="bold")
    for index, text in enumerate(passes, 1):
        out.print(f"pass {index}: {text}", markup=False)
    for name, found in estimates.items():
        out.print(f"{name} would take {found.summary}; {found.free / 1e9:.2f} GB are free", markup=False)
        out.print(found.table())
    for note in notes:
        out.print(note, markup=False)
    for obstacle in obstacles:
        out.print(f"{target} cannot take {obstacle}", markup=False)


def estimates_of(
    program: Program, passes: Sequence[Pass], calibration: Calibration
) -> tuple[dict[str, Estimate], list[str]]:
    """What each run over the calibration data would take, by the passes that share it, and what is not known of it.

    Data is taken to be tokens, as many as the recipe asks for. Nothing is run and no weight is read.
    """
    if not any(isinstance(p, CalibratedPass) for p in passes):
        return {}, []
    if "input_ids" not in (names := [node.name for node in program.inputs]):
        return {}, [
            f"no estimate of the calibration: the program takes {', '.join(names)}, whose sizes the data decides"
        ]
    copy, found, notes = program.clone(), dict[str, Estimate](), list[str]()
    last = max((i for i, p in enumerate(passes) if isinstance(p, SegmentPass)), default=-1)
    for group in together(passes[: last + 1]):
        name = ", ".join(map(str, group))
        members = [p for p in group if isinstance(p, SegmentPass)]
        if members:
            found[name] = _estimate(copy.clone(), members, calibration)
            try:
                found[name].check(calibration.true_sequential)
            except QCompileError as error:
                notes.append(str(error))
        elif group[0].name in _QUICK:
            group[0].run(copy)
        else:
            notes.append(f"estimated without {name}, which is not run for a plan")
    return found, notes


def _estimate(program: Program, passes: Sequence[SegmentPass], calibration: Calibration) -> Estimate:
    settings = calibration.settings()
    length = min(calibration.length, int(program.info.get("max_positions") or calibration.length))
    tokens = torch.zeros(1, dtype=torch.int64).expand(calibration.samples, length)
    batches = torch.split(tokens, calibration.batch)
    setup = Setup(program, without_rounding(program), settings)
    engine = Engine(setup, [p.begin(setup) for p in passes], [{"input_ids": ids} for ids in batches], Processes())
    return estimate(engine)
