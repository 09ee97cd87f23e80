"""How the commands print: tables for people, one JSON object for machines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from rich.console import Console


def console() -> Console:
    """Standard output for people; as wide as the terminal, 120 where there is none."""
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False, soft_wrap=False)


def print_json(data: Any) -> None:
    """One JSON object on standard output."""
    json.dump(data, sys.stdout, indent=1, default=str)
    print()


def size(count: float) -> str:
    """Bytes for people: ``2.6 MB``."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def status(text: str) -> None:
    """A line on standard error that says what is being done."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def working(text: str) -> Iterator[None]:
    """Say what is being done for as long as the block takes: a spinner on a terminal, a line elsewhere.

    For work that shows no bar of its own: only one display can be live.
    """
    if not sys.stderr.isatty():
        status(text)
        yield
        return
    with Console(stderr=True).status(text):
        yield
