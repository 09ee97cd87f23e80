"""Every error qcompile raises on purpose: one line each, saying what, its value, and the way out."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class QCompileError(Exception):
    """Base of all errors that qcompile raises on purpose."""


class VerifyError(QCompileError):
    """A program, or an artifact's result, breaks a rule that must hold."""


class CaptureError(QCompileError):
    """A model could not be turned into a program."""


class RecipeError(QCompileError):
    """A recipe, or a pass string in one, does not say something that can be done."""


class SpecError(QCompileError):
    """A quantization spec is malformed or impossible, or does not fit the tensor it is applied to."""


class LoweringError(QCompileError):
    """A backend cannot express a part of the program."""


class ArtifactError(QCompileError):
    """An artifact directory is missing, incomplete or not what its manifest says."""


def nearest(word: str, valid: Iterable[str]) -> str:
    """`` (did you mean 'x'?)`` where some valid word is close to `word`, else the empty string."""
    close = difflib.get_close_matches(word, list(valid), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
