"""The folders a reader sees are the packages a user gets."""

from __future__ import annotations

import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import qcompile

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize("room", ["passes", "backends"])
def test_a_room_is_part_of_the_package(room: str) -> None:
    link = ROOT / "qcompile" / room
    assert link.is_symlink()
    assert not link.readlink().is_absolute()
    assert link.resolve() == ROOT / room
    module = importlib.import_module(f"qcompile.{room}")
    assert module.__file__ is not None
    assert Path(module.__file__).resolve() == ROOT / room / "__init__.py"


@pytest.mark.parametrize("room", ["qcompile", "passes", "backends"])
def test_every_folder_with_modules_is_a_package(room: str) -> None:
    folders = {path.parent for path in (ROOT / room).rglob("*.py")}
    missing = [str(folder) for folder in folders if not (folder / "__init__.py").is_file()]
    assert missing == []


def test_links_are_kept_by_git() -> None:
    if not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-s", "qcompile/passes", "qcompile/backends"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert [line.split()[0] for line in listed] == ["120000", "120000"]


def test_types_are_shipped() -> None:
    assert qcompile.__file__ is not None
    assert (Path(qcompile.__file__).parent / "py.typed").is_file()


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert version("qcompile") == qcompile.__version__


def test_python_is_recent_enough() -> None:
    assert sys.version_info >= (3, 11)
