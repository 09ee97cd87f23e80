"""Recipes: what to do to a model, as data that reads from YAML, prints back, and is stored in every artifact.

Importing this package is cheap; `resolve` and `pipeline`, which need torch, are loaded when they are first touched.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from qcompile.recipe.model import Calibration, Recipe, Rule

if TYPE_CHECKING:
    from qcompile.recipe.passes import pipeline
    from qcompile.recipe.plan import Plan, Site
    from qcompile.recipe.resolution import resolve

__all__ = ["Calibration", "Plan", "Recipe", "Rule", "Site", "pipeline", "resolve"]

_HOMES = {"Plan": "plan", "Site": "plan", "pipeline": "passes", "resolve": "resolution"}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'qcompile.recipe' has no attribute {name!r}")
    return getattr(importlib.import_module(f"qcompile.recipe.{_HOMES[name]}"), name)
