"""`qcompile opt` and `qcompile bisect`: passes on a program."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qcompile.cli.show import console, print_json
from qcompile.cli.subject import open_program
from qcompile.drift import Drift, bisect
from qcompile.driver import check_feeds
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Pass, Report, parse_pipeline
from qcompile.pass_manager import Dumps, Instrument, OpCounts, PassManager, PrintChanged
from qcompile.report import CompileReport


def run(
    name: str,
    passes: str,
    out: Path | None,
    data: str | None,
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
    reports = PassManager(made, instruments, _batches(made, data, program)).run(program)
    if out is not None:
        _write(program, out)
    if as_json:
        print_json([report.to_dict() for report in reports])
        return
    _print(reports)
    if out is None and not print_changed:
        print(program)


def run_bisect(name: str, passes: str, tolerance: float, data: str | None, as_json: bool) -> None:
    made, program = parse_pipeline(passes), open_program(name)
    found = bisect(program, made, check_feeds(program), tolerance, _batches(made, data, program))
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


def _batches(passes: list[Pass], data: str | None, program: Program) -> Any:
    if not any(isinstance(p, CalibratedPass) for p in passes):
        return None
    from qcompile.data import load_batches

    length = min(256, int(program.info.get("max_positions") or 256))
    return load_batches(
        data or "generated", program.info.get("tokenizer"), samples=64, length=length, seed=0, program=program.clone()
    )


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
        for note in report.notes:
            out.print(f"{report.pass_name}: {note}", markup=False)
