"""Every function-preserving pass on thousands of random programs, compared in float64.

Prints for each pipeline how many programs it changed and how far it moved them, for each pass how often it found
something to do and why not, how many channel spaces were found, and every failure as the plainest program that still
fails. Exits with 1 where there is a failure.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, field
from multiprocessing import get_context
from pathlib import Path

import torch
from common import publish, table

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from spaces.random_programs import PIPELINES, Mismatch, Plan, build, check, simplest, usable_plan

from qcompile.ir.program import Program
from qcompile.ir.verify import VerifyError
from qcompile.pass_manager import op_counts
from qcompile.spaces import Level, channel_spaces

ANALYSIS = "channel_spaces"
FEW = 0.05  # a pass that changes a smaller share of the programs is marked: it may do nothing at all


@dataclass(frozen=True)
class Failure:
    """One program that a pipeline, or the analysis, fails on."""

    pipeline: str
    plan: Plan
    error: str  # the exception's type
    message: str


@dataclass
class Tally:
    """What was seen of a pipeline, a pass or the analysis."""

    programs: int = 0
    changed: int = 0
    rewritten: int = 0
    skipped: int = 0
    failures: int = 0
    seconds: float = 0.0
    drift: float = 0.0
    reasons: Counter[str] = field(default_factory=Counter)

    def add(self, other: Tally) -> None:
        """Take in another's numbers."""
        for name in ("programs", "changed", "rewritten", "skipped", "failures", "seconds"):
            setattr(self, name, getattr(self, name) + getattr(other, name))
        self.drift = max(self.drift, other.drift)
        self.reasons.update(other.reasons)


@dataclass
class Seen:
    """What a run of seeds gave."""

    pipelines: dict[str, Tally] = field(default_factory=dict)
    passes: dict[str, Tally] = field(default_factory=dict)
    levels: dict[str, Tally] = field(default_factory=dict)
    operators: Counter[str] = field(default_factory=Counter)
    calls: int = 0
    building: float = 0.0
    failures: list[Failure] = field(default_factory=list)

    def add(self, other: Seen) -> None:
        """Take in another's numbers."""
        for name in ("pipelines", "passes", "levels"):
            for key, tally in getattr(other, name).items():
                getattr(self, name).setdefault(key, Tally()).add(tally)
        self.operators.update(other.operators)
        self.calls, self.building = self.calls + other.calls, self.building + other.building
        self.failures += other.failures


def look(seeds: Iterable[int], pipelines: list[str]) -> Seen:
    """Build the programs of some seeds, and run every pipeline and the analysis on each."""
    torch.set_num_threads(1)
    seen = Seen()
    for seed in seeds:
        start = time.perf_counter()
        plan = usable_plan(seed)
        program = build(plan)
        seen.building += time.perf_counter() - start
        seen.operators.update(set(op_counts(program)))
        seen.calls += len(program.nodes)
        for pipeline in (*pipelines, ANALYSIS):
            _guarded(seen, pipeline, plan, program)
    return seen


def _guarded(seen: Seen, pipeline: str, plan: Plan, program: Program) -> None:
    """Run a pipeline, or the analysis; whatever goes wrong is a failure of it on this plan."""
    tally = seen.pipelines.setdefault(pipeline, Tally())
    tally.programs += 1
    start = time.perf_counter()
    try:
        if pipeline == ANALYSIS:
            _analyse(seen, program)
        else:
            _run(seen, pipeline, program)
    except Mismatch as error:
        tally.failures, tally.drift = tally.failures + 1, max(tally.drift, error.drift)
        seen.failures.append(Failure(pipeline, plan, "Mismatch", _line(error)))
    except Exception as error:  # a crash in any pass is a finding, and the others are still wanted
        tally.failures += 1
        seen.failures.append(Failure(pipeline, plan, type(error).__name__, _line(error)))
    tally.seconds += time.perf_counter() - start


def _run(seen: Seen, pipeline: str, program: Program) -> None:
    outcome = check(program, pipeline)
    tally = seen.pipelines[pipeline]
    tally.changed += outcome.changed
    tally.drift = max(tally.drift, outcome.drift)
    for report in outcome.reports:
        seen.passes.setdefault(report.pass_name, Tally()).add(
            Tally(
                programs=1,
                changed=bool(report.rewritten),
                rewritten=len(report.rewritten),
                skipped=len(report.skipped),
                seconds=report.seconds,
                reasons=Counter(_kind(entry.what) for entry in report.skipped),
            )
        )
        tally.rewritten += len(report.rewritten)
        tally.skipped += len(report.skipped)


def _analyse(seen: Seen, program: Program) -> None:
    start = time.perf_counter()
    spaces = channel_spaces(program)
    seconds = time.perf_counter() - start
    for level in Level:
        found = spaces[level]
        tally = Tally(programs=1, changed=bool(found), rewritten=len(found), seconds=seconds)
        seen.levels.setdefault(level.name.lower(), Tally()).add(tally)
    seen.pipelines[ANALYSIS].changed += any(spaces[level] for level in Level)


def _line(error: Exception) -> str:
    return (str(error).splitlines() or [""])[0][:200]


def _kind(reason: str) -> str:
    """A reason without the names and numbers of its program, so that the same reasons count together."""
    return re.sub(r"\b[a-z][a-z_0-9]*_\d+\b|'[^']*'|\b\d[\d.e+-]*\b", "…", reason)[:90]


def fails_alike(failure: Failure) -> Callable[[Plan], bool]:
    """Whether a plan fails as `failure` did: the same pipeline, an exception of the same type."""

    def fails(plan: Plan) -> bool:
        try:
            program = build(plan)
        except (VerifyError, RuntimeError, AssertionError):  # digits that stand for no program
            return False
        seen = Seen()
        _guarded(seen, failure.pipeline, plan, program)
        return any(f.error == failure.error for f in seen.failures)

    return fails


def explain(failures: list[Failure], limit: int, tries: int) -> None:
    """Print failures that differ, each as the plainest program that still fails."""
    distinct = {(f.pipeline, f.error, _kind(f.message)): f for f in reversed(failures)}
    for failure in list(distinct.values())[:limit]:
        plan = simplest(failure.plan, fails_alike(failure), tries)
        print(f"\n## {failure.pipeline}: {failure.error}: {failure.message}\n")
        print(f"found with seed {failure.plan.seed}; the plainest that fails:\n\n{plan!r}\n\n{build(plan)}")
    if len(distinct) > limit:
        print(f"\n{len(distinct) - limit} more kinds of failure; --show {len(distinct)} shows them")


def show(seen: Seen, count: int, seed: int, wall: float) -> None:
    """Print the tables; with `--write`, into results/."""
    rows = [_row("pipeline", name, tally) for name, tally in seen.pipelines.items()]
    passes: list[dict[str, object]] = [
        {
            "pass": name,
            "runs": t.programs,
            "found something": _share(t),
            "places rewritten": t.rewritten,
            "left alone": t.skipped,
            "most often because": "; ".join(f"{r} ({n})" for r, n in t.reasons.most_common(2)),
            "ms": f"{1000 * t.seconds / t.programs:.1f}",
        }
        for name, t in seen.passes.items()
    ]
    levels: list[dict[str, object]] = [
        {"group": name, "programs with a space": _share(t), "spaces": t.rewritten} for name, t in seen.levels.items()
    ]
    rare = ", ".join(f"{op} {n}" for op, n in sorted(seen.operators.items(), key=lambda item: item[1])[:12])
    notes = [
        f"{count} programs from seed {seed}, {seen.calls / count:.0f} calls each, {len(seen.operators)} operators "
        f"(the rarest: {rare}); {1000 * seen.building / count:.0f} ms to build one, {wall:.0f} s in all. "
        f"**Bold**: fewer than {FEW:.0%} of the programs.",
        table(passes) if passes else "",
        table(levels) if levels else "",
    ]
    publish("random_graphs", "Passes on random programs", rows, "\n\n".join(filter(None, notes)))


def _row(kind: str, name: str, t: Tally) -> dict[str, object]:
    return {
        kind: name,
        "programs": t.programs,
        "changed": _share(t),
        "places rewritten": t.rewritten,
        "left alone": t.skipped,
        "worst drift": f"{t.drift:.1e}",
        "failures": t.failures,
        "ms": f"{1000 * t.seconds / max(1, t.programs):.1f}",
    }


def _share(t: Tally) -> str:
    text = f"{t.changed} ({t.changed / max(1, t.programs):.0%})"
    return f"**{text}**" if t.changed < FEW * t.programs else text


def main() -> int:
    """Run; the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=3000, help="programs")
    parser.add_argument("--seed", type=int, default=0, help="the first program's")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no more programs after so long")
    parser.add_argument("--pipeline", action="append", help="run this one (again for more) instead of all")
    parser.add_argument("--show", type=int, default=5, help="failures of different kinds to make small and print")
    parser.add_argument("--tries", type=int, default=200, help="plainer programs to try for each of them")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    pipelines = options.pipeline or PIPELINES
    seeds, seen, start = range(options.seed, options.seed + options.count), Seen(), time.perf_counter()
    parts = [seeds[i : i + 25] for i in range(0, len(seeds), 25)]
    with ProcessPoolExecutor(options.jobs, mp_context=get_context("spawn")) as pool:
        for done, part in enumerate(pool.map(look, parts, [pipelines] * len(parts)), 1):
            seen.add(part)
            print(f"\r{done} of {len(parts)} parts, {len(seen.failures)} failures", end="", file=sys.stderr, flush=True)
            if time.perf_counter() - start > options.seconds:
                pool.shutdown(cancel_futures=True)
                break
    print(file=sys.stderr)
    show(seen, seen.pipelines[ANALYSIS].programs, options.seed, time.perf_counter() - start)
    explain(seen.failures, options.show, options.tries)
    return 1 if seen.failures else 0


if __name__ == "__main__":
    sys.exit(main())
