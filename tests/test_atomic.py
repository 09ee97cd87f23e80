"""Directories appear whole or not at all."""

from __future__ import annotations

import errno
import os
from pathlib import Path

import pytest

from qcompile.atomic import check_target, staged_directory
from qcompile.errors import ArtifactError


def half_written(directory: Path, error: Exception) -> None:
    with staged_directory(directory) as staged:
        (staged / "file").write_text("half")
        raise error


def test_appears_whole(tmp_path: Path) -> None:
    with staged_directory(tmp_path / "a" / "out") as staged:
        (staged / "file").write_text("x")
        assert not (tmp_path / "a" / "out").exists()
    assert [p.name for p in (tmp_path / "a").iterdir()] == ["out"]
    assert (tmp_path / "a" / "out" / "file").read_text() == "x"


def test_an_empty_directory_is_taken(tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    with staged_directory(tmp_path / "out") as staged:
        (staged / "file").touch()
    assert (tmp_path / "out" / "file").exists()


def test_vanishes_on_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        half_written(tmp_path / "out", ZeroDivisionError())
    assert list(tmp_path.iterdir()) == []


def test_refuses_what_is_not_empty(tmp_path: Path) -> None:
    (tmp_path / "keep").touch()
    with pytest.raises(ArtifactError, match="is not empty; choose another"), staged_directory(tmp_path):
        pass
    with pytest.raises(ArtifactError, match="is a file"):
        check_target(tmp_path / "keep")
    with pytest.raises(ArtifactError, match="keep is a file"):
        check_target(tmp_path / "keep" / "below")


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match="the disk is full; free some space"):
        half_written(tmp_path / "out", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_no_permission(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(ArtifactError, match="no permission"), staged_directory(tmp_path / "out"):
        pass


def test_other_errors_are_not_renamed(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="elsewhere"), staged_directory(tmp_path / "out"):
        (Path("/elsewhere") / "missing").read_text()
