"""Progress: items pass unchanged, and bars appear only where a person waits."""

from __future__ import annotations

import io
from contextlib import redirect_stderr

import pytest

from qcompile import progress
from qcompile.progress import silence, track


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Bars appear without the wait."""
    monkeypatch.setattr(progress, "SHOW_AFTER", -1.0)
    monkeypatch.setenv("TERM", "xterm")


def test_items_pass_unchanged(at_once: None) -> None:
    with redirect_stderr(io.StringIO()) as out:
        assert list(track(range(5), "counting")) == list(range(5))
    assert out.getvalue() == ""  # a file is no terminal


def test_what_is_quick_shows_nothing() -> None:
    with redirect_stderr(Terminal()) as terminal:
        assert list(track(iter("abc"), "reading")) == ["a", "b", "c"]
    assert terminal.getvalue() == ""


def test_what_is_slow_shows_how_far_it_is(at_once: None) -> None:
    with redirect_stderr(Terminal()) as terminal:
        pairs = [(a, b) for a in track(range(3), "outer") for b in track(range(2), "inner")]
    assert len(pairs) == 6
    shown = terminal.getvalue()
    assert "outer" in shown
    assert "inner" in shown  # it joins the outer's display
    assert progress._shown.get() is None


def test_a_bar_grows_by_what_items_take(at_once: None) -> None:
    shares = []
    with redirect_stderr(Terminal()) as terminal:
        for _ in track("ab", "weighed", weights=[1.0, 3.0]):
            display = progress._shown.get()
            assert display is not None
            shares.append((display.tasks[0].completed, display.tasks[0].total))
    assert shares == [(0, 4.0), (1.0, 4.0)]
    assert "/2" in terminal.getvalue()


def test_the_display_closes_when_the_loop_ends_early(at_once: None) -> None:
    with redirect_stderr(Terminal()):
        loop = track(range(3), "failing")
        next(loop)
        loop.close()  # type: ignore[attr-defined]
    assert progress._shown.get() is None


@pytest.mark.parametrize("how", ["argument", "block"])
def test_silence(at_once: None, how: str) -> None:
    with redirect_stderr(Terminal()) as terminal:
        if how == "argument":
            list(track(range(3), "counting", quiet=True))
        else:
            with silence():
                list(track(range(3), "counting"))
    assert terminal.getvalue() == ""
