"""A spec on a value inside attention: whether it can hold there, said in one line."""

from __future__ import annotations

from torch import fx

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.types import dim_expr
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup
from qcompile.numerics.spec import QuantSpec
from qcompile.recipe.specs import on_activation


def fit_value(spec: QuantSpec, value: fx.Node, features: int, where: str) -> QuantSpec:
    """`spec`, written for ``[…, features]``, on the axes of `value`, whose features are axis `features`.

    Raises RecipeError, naming `where`, for groups that do not divide their axis, and for groups or static channels
    along an axis whose length is known at run time only (tokens).
    """
    try:
        placed = on_activation(spec, value, features)
        sizes = [dim_expr(size) for size in value.meta["val"].shape]
        for axis, group in _groups(placed):
            size = sizes[axis]
            if not isinstance(size, int):
                raise SpecError(f"{spec}: its length along axis {axis} is known at run time only; use token or tensor")
            PerGroup(group).scale_shape((size,))
        if spec.when == "static" and isinstance(placed.granularity, PerChannel):
            varying = [axis for axis in placed.granularity.axes if not isinstance(sizes[axis], int)]
            if varying:
                raise SpecError(f"{spec}: axis {varying[0]} has another length at every call; use tensor")
        placed.parameters(value.meta["val"].shape)
    except SpecError as error:
        raise RecipeError(f"{where}: {error}") from None
    return placed


def _groups(spec: QuantSpec) -> list[tuple[int, int]]:
    """The axes that the spec cuts into groups, each with the size of a group."""
    match spec.granularity:
        case PerGroup(size, axis):
            return [(axis, size)]
        case PerBlock(rows, columns):
            return [(-2, rows), (-1, columns)]
    return []
