"""docs/writing_a_pass.md: every block is written to the file it names, and runs."""

from __future__ import annotations

import os
import re
import runpy
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from qcompile.pass_base import PASSES, all_passes

PAGE = (Path(__file__).parents[1] / "docs" / "writing_a_pass.md").read_text()
BLOCKS = dict(re.findall(r"```\w+ (\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [line[2:] for line in PAGE.splitlines() if line.startswith("$ ")]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The page's files, with the pass installed as its pyproject.toml says."""
    for name, text in BLOCKS.items():
        (tmp_path / name).write_text(text)
    project = tomllib.loads(BLOCKS["pyproject.toml"])["project"]
    info = tmp_path / f"{project['name'].replace('-', '_')}-{project['version']}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [
        f"[{group}]\n" + "\n".join(f"{k} = {v}" for k, v in d.items()) for group, d in project["entry-points"].items()
    ]
    (info / "entry_points.txt").write_text("\n".join(lines) + "\n")
    before = all_passes()
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    PASSES.clear()
    PASSES.update(before)
    sys.modules.pop("merge_scales", None)


def test_every_block_is_used() -> None:
    names = [
        "merge_scales.py",
        "test_merge_scales.py",
        "pyproject.toml",
        "scales.qir",
        "merged.qir",
        "run_merge_scales.py",
    ]
    assert list(BLOCKS) == names
    assert PAGE.count("```") == 2 * (len(names) + 1)  # and the command
    assert len(COMMANDS) == 1


def test_the_pass_is_short(folder: Path) -> None:
    assert 40 <= len(BLOCKS["merge_scales.py"].splitlines()) <= 60


def test_its_tests_pass_and_it_runs_in_code(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = runpy.run_path(str(folder / "test_merge_scales.py"))
    tests = [name for name in found if name.startswith("test_")]
    assert len(tests) == 5
    for name in tests:
        found[name]()
    runpy.run_path(str(folder / "run_merge_scales.py"))
    assert capsys.readouterr().out == "scale (z) multiplies by 1.5 at once\n"


def test_the_command_finds_it_by_its_entry_point_and_writes_what_is_shown(folder: Path) -> None:
    (folder / "merged.qir").unlink()
    program, *arguments = shlex.split(COMMANDS[0])
    assert program == "qcompile"
    command = [sys.executable, "-c", "from qcompile.cli import main; main()", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (folder / "merged.qir").read_text() == BLOCKS["merged.qir"]
    assert "merge-scales(limit=100.0)" in done.stdout


def test_the_page_is_formatted_like_the_project(folder: Path) -> None:
    files = [name for name in BLOCKS if name.endswith(".py")]
    checked = subprocess.run(
        [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "E,F,W,B", "--line-length", "120", *files],
        capture_output=True,
        text=True,
        check=False,
    )
    assert checked.returncode == 0, checked.stdout
