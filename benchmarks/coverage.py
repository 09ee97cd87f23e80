"""Every family of `tests/families/` through every function-preserving pass: what was done, what stops it, how exact.

    python benchmarks/coverage.py                    # all families, in two processes
    python benchmarks/coverage.py llama gemma2       # some
    python benchmarks/coverage.py --write            # all, into docs/coverage.md

Models are tiny and random, in float64, with gains, biases and eps away from their usual values. Drift is
max |Δlogit| / max |logit| between the program as captured and the program after each pass, on inputs of other sizes
than the traced ones, the second half of them read with the cache that the first half left.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import sys
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common import circumstances, table

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "tests"))  # where the families live

PASSES = (
    "raise-norms",
    "fold-embedding-norm",
    "equalize",
    "permute",
    "fold-norm-affine",
    "center-norm",
    "rotate(qk=true, orphans=true)",
)
TOLERANCE, CAPTURED = 1e-10, 1e-12
ROTATIONS = ("R1", "R2", "R3", "R4")
PAGE = ROOT / "docs" / "coverage.md"
WIDEST, ERROR = 110, 320  # characters of a reason, of an error


@dataclass
class Row:
    """What became of one family."""

    name: str
    parameters: int = 0
    captured: float = math.inf  # how far the program is from the model
    calls: int = 0
    cached: bool = False
    spaces: str = ""
    norms: int = 0
    rotations: Counter[str] = field(default_factory=Counter)
    drifts: list[float] = field(default_factory=list)  # after each pass
    skipped: Counter[str] = field(default_factory=Counter)  # reasons
    errors: list[str] = field(default_factory=list)  # what failed, and why
    seconds: float = 0.0

    @contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Where it fails, the row says so, and the table goes on."""
        try:
            yield
        except Exception as failure:  # of a family; it must not cost the others
            self.errors.append(f"{what} fails: {_line(failure)}")

    @property
    def exact(self) -> bool:
        """Whether it was captured, and every pass ran and kept the function."""
        kept = len(self.drifts) == len(PASSES) and all(drift <= TOLERANCE for drift in self.drifts)
        return kept and self.captured <= CAPTURED


def main() -> None:
    from families.table import FAMILIES

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("families", nargs="*", metavar="family", help=f"of {', '.join(FAMILIES)}; all if none")
    parser.add_argument("--write", action="store_true", help="put the table into docs/coverage.md")
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    arguments = parser.parse_args()
    if unknown := set(arguments.families) - set(FAMILIES):
        parser.error(f"there is no family {', '.join(sorted(unknown))}")
    if arguments.write and arguments.families:
        parser.error("--write is for all families; name none")
    start, rows = time.perf_counter(), []
    for row in measure_all(arguments.families or list(FAMILIES), arguments.jobs):
        rows.append(row)
        print(
            f"{row.name:14} {row.seconds:6.1f} s  {'; '.join(row.errors) or summary(row)}", file=sys.stderr, flush=True
        )
    text = page(rows, time.perf_counter() - start)
    print(text)
    if arguments.write:
        PAGE.write_text(text)
    wrong = [row.name for row in rows if row.calls and (row.errors or not row.exact)]
    if wrong:
        sys.exit(f"not exact, or something failed: {', '.join(wrong)}")


def measure_all(names: list[str], jobs: int) -> Iterator[Row]:
    """Rows in the order of `names`, as they are done."""
    if jobs == 1 or len(names) == 1:
        yield from map(measure, names)
        return
    with ProcessPoolExecutor(jobs, mp_context=multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(measure, names)


def measure(name: str) -> Row:
    """Capture a family and run every pass on it. What goes wrong is part of the row."""
    import torch
    from families.captured import SHAPES, capture_family, inputs_of, logits

    torch.set_num_threads(1)
    start, row = time.perf_counter(), Row(name)
    with row.doing("capture"):
        made, feeds = capture_family(name), inputs_of(name, *SHAPES[0])
        _look(row, made, feeds)
    if not row.errors:
        with row.doing("channel_spaces"):
            row.spaces = spaces(made.program)
        wanted = logits(made.program, feeds)
        for done, text in enumerate(PASSES):
            if len(row.drifts) == done:
                with row.doing(text):
                    _run(row, text, made.program, feeds, wanted)
    row.seconds = time.perf_counter() - start
    return row


def _look(row: Row, made: Any, feeds: Any) -> None:
    from families.captured import error, logits, theirs

    row.captured = error(logits(made.program, feeds), theirs(made.model, feeds))
    row.parameters = sum(math.prod(made.program.weights.meta(key)[0]) for key in made.program.weights)
    row.calls = len(made.program.nodes)
    row.cached = any(node.name.startswith("past_key_values_") for node in made.program.inputs)


def _run(row: Row, text: str, program: Any, feeds: Any, wanted: Any) -> None:
    from families.captured import error, logits

    from qcompile import run_passes

    for report in run_passes(program, text):
        row.norms += len(report.rewritten) if report.pass_name.startswith("raise-norms") else 0
        measured = report.measured.get("rotations", {})
        row.rotations.update({name: int(measured[name]) for name in ROTATIONS if name in measured})
        row.skipped.update(f"{_operator(entry.where)}: {entry.what}" for entry in report.skipped)
    row.drifts.append(error(logits(program, feeds), wanted))


def spaces(program: Any) -> str:
    """How many spaces admit an orthogonal matrix, a positive factor a channel, a permutation."""
    from qcompile.spaces import Level, channel_spaces

    found = channel_spaces(program)
    levels = (Level.ORTHOGONAL, Level.DIAGONAL, Level.PERMUTATION)
    return " / ".join(str(sum(space.width > 1 for space in found[level])) for level in levels)


def summary(row: Row) -> str:
    """One line."""
    done = ", ".join(f"{name} {row.rotations[name]}" for name in ROTATIONS if row.rotations[name])
    drifts = " ".join(f"{drift:.0e}" for drift in row.drifts)
    return f"{row.calls} calls, {row.norms} norms raised{', ' + done if done else ''}, drift {drifts}"


def page(rows: list[Row], seconds: float) -> str:
    """The page docs/coverage.md."""
    captured = sum(row.calls > 0 for row in rows)
    exact = sum(row.exact for row in rows)
    return "\n".join(
        [
            "# Coverage",
            "",
            f"Tiny random models of {len(rows)} families of transformers: {captured} are captured, and {exact} keep "
            f"their function within {TOLERANCE:.0e} through every pass. Gains, biases and eps are away from their "
            "usual values; the arithmetic is float64; drift is max |Δlogit| / max |logit| against the program as "
            f"captured, which is within {CAPTURED:.0e} of the model's own logits.",
            "",
            "Cache: keys and values are inputs and outputs of the program. Spaces: how many admit an orthogonal "
            "matrix, a positive factor a channel, a permutation, as captured. R1 … R4: rotations of the stream, of "
            "values, of queries and keys, in front of what admits none. What stops: what a pass left alone, and why.",
            "",
            f"{circumstances()}; {seconds:.0f} s. Command: `python benchmarks/coverage.py --write`. "
            f"Passes, in order: {', '.join(f'`{text}`' for text in PASSES)}.",
            "",
            table([_cells(row) for row in rows]),
            "",
        ]
    )


def _cells(row: Row) -> dict[str, object]:
    known = row.calls > 0
    drifts: list[float | None] = [*row.drifts, *[None] * (len(PASSES) - len(row.drifts))]
    reasons = [f"{_short(reason)}{f' ({count}×)' if count > 1 else ''}" for reason, count in row.skipped.most_common(3)]
    more = len(row.skipped) - len(reasons)
    stops = "; ".join([*row.errors, *reasons, *([f"and {more} more reasons"] if more > 0 else [])])
    return {
        "family": row.name,
        "against transformers": f"{row.captured:.0e}" if known else "",
        "parameters": row.parameters if known else "",
        "calls": row.calls if known else "",
        "cache": ("yes" if row.cached else "no") if known else "",
        "spaces": row.spaces,
        "norms raised": row.norms if known else "",
        **{name: row.rotations[name] if known else "" for name in ROTATIONS},
        **{f"drift: {text}": "" if d is None else f"{d:.0e}" for text, d in zip(PASSES, drifts, strict=True)},
        "what stops": stops.replace("|", "\\|"),
    }


def _operator(where: str) -> str:
    """The last part of a place that has no number in it: ``model.layers.3.mlp (mul_7)`` → ``mlp``."""
    parts = [part for part in where.partition(" (")[0].split(".") if not part.isdigit()]
    return parts[-1] if parts else where


def _line(failure: Exception) -> str:
    from qcompile import QCompileError

    said = " ".join(str(failure).split())[:ERROR]
    return said if isinstance(failure, QCompileError) else f"{type(failure).__name__}: {said}"


def _short(text: str) -> str:
    return text if len(text) <= WIDEST else text[: WIDEST - 1] + "…"


if __name__ == "__main__":
    main()
