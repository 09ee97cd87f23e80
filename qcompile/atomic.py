"""Writing a directory so that there is never half of one: beside it first, renamed into place last."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from qcompile.errors import ArtifactError

_REASONS = {
    errno.ENOSPC: "the disk is full; free some space or choose another directory",
    errno.EDQUOT: "the disk quota is used up; free some space or choose another directory",
    errno.EACCES: "no permission to write there; choose another directory",
    errno.EPERM: "no permission to write there; choose another directory",
    errno.EROFS: "the file system is read-only; choose another directory",
    errno.ENOENT: "its parent directory does not exist; create it first",
    errno.ENOTDIR: "part of the path is a file; choose another directory",
}


def check_target(directory: Path) -> None:
    """Raise ArtifactError unless `directory` can be made: absent or empty, under a writable parent."""
    if directory.is_file() or (directory.is_dir() and any(directory.iterdir())):
        kind = "is a file" if directory.is_file() else "is not empty"
        raise ArtifactError(f"output {directory} {kind}; choose another directory or remove it")
    existing = next(p for p in [directory.parent, *directory.parent.parents] if p.exists())
    if not existing.is_dir():
        raise ArtifactError(f"output {directory}: {existing} is a file; choose another directory")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ArtifactError(f"output {directory}: no permission to write in {existing}; choose another directory")


@contextmanager
def staged_directory(directory: str | Path) -> Iterator[Path]:
    """A fresh directory that becomes `directory` when the block ends without an error, and vanishes otherwise.

    Raises ArtifactError where `directory` is not empty, can't be written, or the disk fills up.
    """
    directory = Path(directory).absolute()
    check_target(directory)
    staged = directory.parent / f".{directory.name}.partial-{os.getpid()}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        staged.mkdir()
        yield staged
        if directory.is_dir():
            directory.rmdir()  # empty, as checked
        staged.rename(directory)
    except OSError as error:
        reason = _REASONS.get(error.errno or 0)
        if reason is None or (error.filename is not None and not str(error.filename).startswith(str(directory.parent))):
            raise
        raise ArtifactError(f"cannot write {directory}: {reason}") from error
    finally:
        if staged.exists():
            shutil.rmtree(staged)
