"""How far passes move what a program computes: the measure, the instrument that takes it, and the bisection.

A decoder's cache may be kept in another basis by a pass that keeps the function, so what it returns of the cache is not
compared. Instead the prompt goes through in two parts, the second one with the program's own cache of the first, and
the other outputs of both parts are compared.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import sympy
import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.ir.state import state_pairs
from qcompile.ir.types import Dim, dim_expr
from qcompile.pass_base import Pass, Report
from qcompile.pass_manager import PassManager


def drift(now: Mapping[str, Tensor], before: Mapping[str, Tensor]) -> float:
    """max |now − before| / max |before|, the largest over floating-point outputs; inf where shapes differ or nan.

    An output that is codes now (a cache, say) is not compared.
    """
    worst = 0.0
    for name, old in before.items():
        new = now.get(name)
        if not old.is_floating_point() or old.numel() == 0 or (new is not None and not new.is_floating_point()):
            continue
        if new is None or new.shape != old.shape:
            return float("inf")
        moved = (new.double() - old.double()).abs().max() / old.double().abs().max().clamp(min=1e-300)
        worst = max(worst, float(torch.nan_to_num(moved, nan=float("inf"))))
    return worst


def observe(program: Program, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The outputs of a program that do not depend on the basis of its cache.

    A program without a cache, without `input_ids`, or that takes one length only runs once, and all its outputs count.
    Any other runs twice, on the first and second half of the prompt, and its outputs beside the cache come out as
    ``NAME`` and ``NAME (continued)``. A cache in `feeds` is left aside: it starts empty.
    """
    pairs, ids = state_pairs(program), feeds.get("input_ids")
    if not pairs or ids is None or ids.shape[1] < 2 or not _varies(_length(program)):
        return program.run(feeds)
    state, cut = {pair.past.name for pair in pairs}, ids.shape[1] // 2
    prompt = {name: feed for name, feed in feeds.items() if name not in state}
    if "attention_mask" in prompt:  # of the prompt's own tokens
        prompt["attention_mask"] = prompt["attention_mask"][:, -ids.shape[1] :]
    first = program.run(fill(program, _part(program, prompt, 0, cut)))
    cache = {pair.past.name: first[pair.present] for pair in pairs}
    second = program.run(fill(program, _part(program, prompt, cut, ids.shape[1]) | cache))
    hidden = {pair.present for pair in pairs}
    seen = {name: tensor for name, tensor in first.items() if name not in hidden}
    return seen | {f"{name} (continued)": tensor for name, tensor in second.items() if name not in hidden}


def _length(program: Program) -> Dim | None:
    """The size of a prompt as the program declares it: a number, or a symbol."""
    ids = next((node for node in program.inputs if node.name == "input_ids"), None)
    return None if ids is None else dim_expr(ids.meta["val"].shape[1])


def _varies(size: Dim | None) -> bool:
    return isinstance(size, sympy.Expr) and bool(size.free_symbols)


def _part(program: Program, prompt: Mapping[str, Tensor], start: int, stop: int) -> dict[str, Tensor]:
    """Tokens `start` to `stop` of a prompt: the mask up to there, of other inputs the axes that are as long as it."""
    length, sizes = _length(program), {node.name: node.meta["val"].shape for node in program.inputs}
    parts = {}
    for name, feed in prompt.items():
        if name == "attention_mask":
            parts[name] = feed[:, :stop]
            continue
        for axis, size in enumerate(sizes.get(name, ())):
            if dim_expr(size) == length:
                feed = feed.narrow(axis, start, stop - start)
        parts[name] = feed
    return parts


@dataclass
class Drift:
    """Observes the program on fixed inputs after each pass and records how far the outputs moved from before it.

    The measure is `drift` of what `observe` sees. Passes that promise to keep the function and move it by more than
    `tolerance` raise. With `only_preserving`, no other passes are looked at; with `at`, only the outputs after those
    passes (by index). With `says`, reports get a note of it and of the seconds that the check took.
    """

    feeds: dict[str, Tensor]
    tolerance: float | None = None
    only_preserving: bool = False
    at: frozenset[int] | None = None
    says: str = ""
    last: dict[str, Tensor] = field(default_factory=dict)
    covered: list[str] = field(default_factory=list)  # passes since the last look
    seconds: float = 0.0

    def before(self, index: int, pass_: Pass, program: Program) -> None:
        """Look at the program where nothing is known of it yet."""
        if not self.last and (pass_.preserves_function or not self.only_preserving):
            self.last = self._look(program)

    def after(self, index: int, pass_: Pass, program: Program, report: Report) -> None:
        """Compare. Raises QCompileError for a function-preserving pass beyond the tolerance."""
        if self.only_preserving and not pass_.preserves_function:
            self.last, self.covered = {}, []  # the function changed on purpose: the next pass is measured from here
            return
        self.covered.append(str(pass_))
        if self.at is not None and index not in self.at:
            return
        now = self._look(program)
        report.drift = drift(now, self.last)
        if self.says:
            report.note(f"{', '.join(self.covered)}: {self.says}; that took {self.seconds:.1f} s")
        who, self.last, self.covered, self.seconds = self.covered, now, [], 0.0
        if self.tolerance is not None and pass_.preserves_function and not report.drift <= self.tolerance:
            named = f"pass {who[0]}" if len(who) == 1 else f"one of passes {', '.join(who)}"
            raise QCompileError(
                f"{named} changed the function: outputs moved by {report.drift:.2e} of their maximum "
                f"(tolerance {self.tolerance:.0e}); leave it out, or find the culprit with qcompile bisect"
            )

    def _look(self, program: Program) -> dict[str, Tensor]:
        start = time.perf_counter()
        seen = observe(program, _fitting(self.feeds, program))
        self.seconds += time.perf_counter() - start
        return seen


def _fitting(feeds: Mapping[str, Tensor], program: Program) -> dict[str, Tensor]:
    """`feeds` for the inputs that the program has by now: a pass may have changed those of a cache."""
    inputs = {node.name: node.meta["val"].dtype for node in program.inputs}
    return fill(program, {name: feed for name, feed in feeds.items() if inputs.get(name) == feed.dtype})


@dataclass(frozen=True)
class Bisection:
    """The first pass that moved the outputs by more than the tolerance."""

    index: int
    pass_: Pass
    drift: float


def bisect(
    program: Program,
    passes: Sequence[Pass],
    feeds: dict[str, Tensor],
    tolerance: float,
    batches: Iterable[Tensor] | None = None,
) -> Bisection | None:
    """Find the first pass after which the outputs differ from the unchanged program's by more than `tolerance`.

    Runs O(log n) prefixes of the pipeline on copies of `program`, assuming that a program once broken stays broken.
    Returns None where the whole pipeline keeps within the tolerance.
    """
    reference = observe(program, feeds)

    def moved(count: int) -> float:
        copy = program.clone()
        PassManager(passes, batches=batches, stop_after=count).run(copy)
        return drift(observe(copy, _fitting(feeds, copy)), reference)

    if (whole := moved(len(passes))) <= tolerance:
        return None
    good, bad, worst = 0, len(passes), whole
    while bad - good > 1:
        middle = (good + bad) // 2
        if (now := moved(middle)) <= tolerance:
            good = middle
        else:
            bad, worst = middle, now
    return Bisection(bad - 1, passes[bad - 1], worst)
