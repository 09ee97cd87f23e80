"""`qcompile opt` and `qcompile bisect`: passes on a program."""

from __future__ import annotations

from pathlib import Path

import torch

from qcompile.cli.show import console, print_json
from qcompile.cli.subject import open_program
from qcompile.data import Batches, InputBatches
from qcompile.drift import Drift, bisect
from qcompile.driver import calibration_data, check_feeds
from qcompile.errors import QCompileError, RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, parse_pipeline
from qcompile.pass_manager import Dumps, Instrument, OpCounts, PassManager, PrintChanged
from qcompile.recipe import Recipe
from qcompile.recipe.model import Calibration
from qcompile.report import CompileReport


def run(
    name: str,
    passes: str,
    out: Path | None,
    data: str | None,
    settings: list[str],
    resume: Path | None,
    dump: Path | None,
    print_changed: bool,
    drift: bool,
    as_json: bool,
) -> None:
    made, program = parse_pipeline(passes), open_program(name)
    instruments: list[Instrument] = [OpCounts()]
    instruments += [Dumps(dump)] if dump else []
    instruments += [PrintChanged()] if print_changed else []
    instruments += [Drift(check_feeds(program))] if drift else []
    batches = _batches(made, data, settings, program)
    how = _calibration(settings).settings()
    reports = PassManager(made, instruments, batches, settings=how, resume=resume).run(program)
    if out is not None:
        _write(program, out)
    if as_json:
        print_json([report.to_dict() for report in reports])
        return
    _print(reports)
    if out is None and not print_changed:
        print(program)


def run_bisect(name: str, passes: str, tolerance: float, data: str | None, settings: list[str], as_json: bool) -> None:
    made, program = parse_pipeline(passes), open_program(name)
    found = bisect(program, made, check_feeds(program), tolerance, _batches(made, data, settings, program))
    if as_json:
        print_json(
            {
                "culprit": None if found is None else str(found.pass_),
                "index": None if found is None else found.index,
                "drift": None if found is None else found.drift,
                "tolerance": tolerance,
            }
        )
    elif found is None:
        console().print(f"no pass moves the outputs by more than {tolerance:.0e} of their maximum")
    else:
        where = f"pass {found.index + 1} of {len(made)}"
        console().print(
            f"{where}, {found.pass_}, moves the outputs by {found.drift:.1e} of their maximum", markup=False
        )


def _batches(
    passes: list[Pass], data: str | None, settings: list[str], program: Program
) -> Batches | InputBatches | None:
    """What the passes are calibrated on; the settings are those of a recipe's calibration."""
    return calibration_data(passes, _calibration(settings), data, program.clone())


def _calibration(settings: list[str]) -> Calibration:
    for setting in settings:
        if not setting.strip().startswith("calibration."):
            raise RecipeError(f"--set {setting!r}: there is no recipe here; only calibration.FIELD=VALUE can be set")
    return Recipe().override(settings).calibration


def _write(program: Program, out: Path) -> None:
    if out.exists():
        raise QCompileError(f"output {out} exists; choose another name")
    if out.suffix == ".qir":
        out.write_text(f"{program}\n")
    elif out.suffix == ".pt2":
        torch.export.save(program.to_exported(), out)
    else:
        from qcompile.atomic import staged_directory
        from qcompile.capture.saved import save_program

        with staged_directory(out) as staged:
            save_program(program, staged)


def _print(reports: list[Report]) -> None:
    out = console()
    out.print(CompileReport(passes=reports).table())
    for report in reports:
        for entry in report.skipped:
            out.print(f"{report.pass_name} left alone {entry.where}: {entry.what}", markup=False)
        for entry in report.spaces:
            out.print(f"{report.pass_name}: space {entry.where}: {entry.what}", markup=False)
        for note in report.notes:
            out.print(f"{report.pass_name}: {note}", markup=False)
