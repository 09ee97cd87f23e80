"""qcompile: a language model and a recipe in, a smaller, faster model that is proven to be the same model out.

    import qcompile as qc
    model = qc.compile("path/to/model", recipe="int4-g128")
    artifact = model.export("onnx_qcdq", "out")

Importing this package is cheap: each name loads what it needs when it is first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_HOMES = {
    "Artifact": "qcompile.artifact",
    "CompiledModel": "qcompile.compiled",
    "Pass": "qcompile.pass_base",
    "PassManager": "qcompile.pass_manager",
    "Program": "qcompile.ir.program",
    "QCompileError": "qcompile.errors",
    "QuantSpec": "qcompile.numerics.spec",
    "Recipe": "qcompile.recipe",
    "Report": "qcompile.pass_base",
    "capture": "qcompile.capture",
    "channel_spaces": "qcompile.spaces",
    "compile": "qcompile.driver",
    "load": "qcompile.compiled",
    "register": "qcompile.pass_base",
    "run_passes": "qcompile.driver",
    "verify": "qcompile.artifact",
}

__all__ = [
    "Artifact",
    "CompiledModel",
    "Pass",
    "PassManager",
    "Program",
    "QCompileError",
    "QuantSpec",
    "Recipe",
    "Report",
    "__version__",
    "capture",
    "channel_spaces",
    "compile",
    "load",
    "register",
    "run_passes",
    "verify",
]

if TYPE_CHECKING:
    from qcompile.artifact import Artifact, verify
    from qcompile.capture import capture
    from qcompile.compiled import CompiledModel, load
    from qcompile.driver import compile, run_passes
    from qcompile.errors import QCompileError
    from qcompile.ir.program import Program
    from qcompile.numerics.spec import QuantSpec
    from qcompile.pass_base import Pass, Report, register
    from qcompile.pass_manager import PassManager
    from qcompile.recipe import Recipe
    from qcompile.spaces import channel_spaces


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted(__all__)
