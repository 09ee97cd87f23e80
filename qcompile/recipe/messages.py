"""One-line messages about what is wrong with a recipe."""

from __future__ import annotations

import dataclasses

from pydantic import BaseModel, ValidationError

from qcompile.errors import nearest
from qcompile.recipe.model import Calibration, Rule
from qcompile.recipe.parts import PARTS


def explain(error: ValidationError, top: type[BaseModel]) -> str:
    """The first thing wrong, as one line: where, what was given, and the way out."""
    first = error.errors(include_url=False)[0]
    steps = [str(step) for step in first["loc"] if not str(step).startswith(("str", "dict[", "int", "function-"))]
    where = ".".join(steps)
    if first["type"] in ("extra_forbidden", "unexpected_keyword_argument"):
        names = valid_names(steps[0], top) if len(steps) > 1 else list(top.model_fields)
        return f"recipe field {where!r} is unknown{nearest(steps[-1], names)}; the fields there are {', '.join(names)}"
    if first["type"] == "value_error":
        return f"recipe field {where!r}: {first['ctx']['error']}"
    return f"recipe field {where!r}: {first['msg'][0].lower()}{first['msg'][1:]} (given {first['input']!r})"


def valid_names(field: str, top: type[BaseModel]) -> list[str]:
    """Names that may stand below a top-level field of a recipe."""
    if field == "rules":
        return [f.name for f in dataclasses.fields(Rule)]
    if field == "calibration":
        return list(Calibration.model_fields)
    if field in PARTS:
        return PARTS[field].names()
    return list(top.model_fields)
