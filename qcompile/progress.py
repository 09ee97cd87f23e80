"""Progress bars with the time left, on standard error, for whatever takes longer than two seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, TypeVar

if TYPE_CHECKING:
    from rich.progress import Progress

SHOW_AFTER = 2.0
"""Seconds before a bar appears: what is done sooner needs none."""

T = TypeVar("T")
_silent: ContextVar[bool] = ContextVar("silent", default=False)
_shown: ContextVar[Progress | None] = ContextVar("shown", default=None)  # the display that inner loops join


@contextmanager
def silence(on: bool = True) -> Iterator[None]:
    """Show no bars inside the block (``--quiet``)."""
    token = _silent.set(on or _silent.get())
    try:
        yield
    finally:
        _silent.reset(token)


def track(
    iterable: Iterable[T],
    description: str,
    total: int | None = None,
    quiet: bool = False,
    weights: Sequence[float] | None = None,
) -> Iterator[T]:
    """Yield from `iterable` and show how far it is, how long it took and how long it will take.

    Args:
        description: what is going on, e.g. ``"calibrating"``.
        total: number of items; ``len(iterable)`` if None and it has one, else the bar shows no end.
        weights: what each item takes, in any unit; alike if None.
        quiet: show nothing. Nothing is shown either inside `silence()` or where standard error is no terminal.
    """
    if quiet or _silent.get() or not sys.stderr.isatty():
        yield from iterable
        return
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    began = time.monotonic()
    bar: _Bar | None = None
    try:
        for done, item in enumerate(iterable):
            if bar is None and time.monotonic() - began > SHOW_AFTER:
                bar = _Bar(description, total, done, weights)
            yield item
            if bar is not None:
                bar.advance()
    finally:
        if bar is not None:
            bar.close()


class _Bar:
    """One line of the display; the first opens the display, and closes it."""

    def __init__(self, description: str, total: int | None, done: int, weights: Sequence[float] | None) -> None:
        outer = _shown.get()
        self.owner = outer is None
        self.display = outer or _display()
        if self.owner:
            self.display.start()
            _shown.set(self.display)
        self.total, self.done, self.weights = total, done, weights
        whole = total if weights is None else sum(weights)
        self.task = self.display.add_task(description, total=whole, count=self._count())
        self.display.update(self.task, completed=done if weights is None else sum(weights[:done]))

    def advance(self) -> None:
        weight = 1.0 if self.weights is None else self.weights[self.done]
        self.done += 1
        self.display.update(self.task, advance=weight, count=self._count())

    def _count(self) -> str:
        return f"{self.done}/{'?' if self.total is None else self.total}"

    def close(self) -> None:
        self.display.remove_task(self.task)
        if self.owner:
            self.display.stop()
            _shown.set(None)


def _display() -> Progress:
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.fields[count]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
        console=Console(stderr=True),
        speed_estimate_period=600.0,  # seconds to look back on: single items can take minutes
        transient=True,
    )
