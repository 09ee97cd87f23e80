"""Every docstring example runs, in modules imported under their one true name."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest

import qcompile

MODULES = [
    "qcompile",
    *(m.name for m in pkgutil.walk_packages(qcompile.__path__, "qcompile.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    assert doctest.testmod(importlib.import_module(name)).failed == 0
