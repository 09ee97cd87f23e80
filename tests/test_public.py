"""The public face: every name of the contract is there, and importing the package is cheap."""

from __future__ import annotations

import subprocess
import sys

import pytest

import qcompile

CONTRACT = [
    "compile",
    "load",
    "verify",
    "capture",
    "run_passes",
    "Program",
    "QuantSpec",
    "Recipe",
    "CompiledModel",
    "Artifact",
]


@pytest.mark.parametrize("name", qcompile.__all__)
def test_every_public_name_imports(name: str) -> None:
    assert getattr(qcompile, name) is not None


@pytest.mark.parametrize("name", CONTRACT)
def test_the_contract_is_public(name: str) -> None:
    assert name in qcompile.__all__
    assert (getattr(qcompile, name).__doc__ or "").strip()


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = qcompile.nonsense


@pytest.mark.parametrize("statement", ["import qcompile", "from qcompile.cli.app import app", "import qcompile.zoo"])
def test_import_is_light(statement: str) -> None:
    heavy = ["torch", "transformers", "onnx", "onnxruntime", "numpy", "pydantic", "yaml"]
    code = f"{statement}\nimport sys\nprint([m for m in {heavy} if m in sys.modules])"
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
    )
