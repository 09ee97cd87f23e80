"""Options of the methods that round column by column and let later columns make up for earlier ones."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from qcompile.errors import RecipeError
from qcompile.passes.round.rounding import Rounding
from qcompile.rounding import AwqClip, Order
from qcompile.rounding.solve import Groups


@dataclass(frozen=True)
class Compensating(Rounding):
    """Options of all of them, beside those of `Rounding`.

    Args:
        act_order: columns by falling diagonal of H; ``group``: groups so, and columns inside them, which stay together.
        static_groups: scales are chosen before the first column is rounded; else each group's when its turn comes,
            from the columns as they are by then (not with ``act_order: true``, ``clip`` or ``accumulator_bits``).
        clip: ranges are searched as `awq-clip` does, which leaves queries and keys out.
    """

    act_order: bool | Literal["group"] = True
    static_groups: bool = True
    clip: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.static_groups:
            return
        if self.act_order is True:
            raise RecipeError(f"{self.name}: act_order=true needs static_groups=true; or take act_order=group")
        if self.clip or self.accumulator_bits is not None:
            option = "clip" if self.clip else "accumulator_bits"
            raise RecipeError(f"{self.name}: {option} needs scales that are known ahead; take static_groups=true")

    @property
    def groups(self) -> Groups:
        """As `static_groups` says."""
        return "static" if self.static_groups else "running"

    @property
    def clipping(self) -> AwqClip | None:
        """As `clip` says."""
        return AwqClip() if self.clip else None

    @property
    def order(self) -> Order:
        """As `act_order` says."""
        return "act" if self.act_order is True else "group" if self.act_order == "group" else "none"
