"""Every docstring example runs, in modules imported under their one true name."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil

import pytest

import qcompile

MODULES = [
    "qcompile",
    *(m.name for m in pkgutil.walk_packages(qcompile.__path__, "qcompile.") if "__main__" not in m.name),
]


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    if name.startswith("qcompile.backends.triton.kernels.") and importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed")
    assert doctest.testmod(importlib.import_module(name)).failed == 0
