"""What a method is given, and what it hands to the recursion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.rounding.factor import Factored, Factors, factor
from qcompile.rounding.order import Order


@dataclass(frozen=True, eq=False)
class Sums:
    """Second moments of a layer's inputs, in the order of its columns: `hessian` H = X̂X̂ᵀ and, where the float
    stream's inputs X are known too, `cross` G = X̂Xᵀ; both [in, in], of one scale. `factors`: what is known of H
    already, and `order` that of the columns in it.
    """

    hessian: Tensor
    cross: Tensor | None
    factors: Factors | None = None
    order: Tensor | None = None

    @property
    def dead(self) -> Tensor:
        """[in]: where nothing came in."""
        return self.hessian.diagonal() == 0

    def alive(self, columns: Tensor) -> Tensor:
        """`columns` [in, out] with those of dead inputs 0."""
        dead = self.dead
        return columns.masked_fill(dead.unsqueeze(1), 0) if bool(dead.any()) else columns

    def factor(self, damping: float, unit: float | None = None) -> Factored:
        """H factored, as `factor` does; once for all that share `factors`."""
        if self.factors is None:
            return factor(self.hessian, damping, unit)
        return self.factors.of(self.hessian, damping, unit, self.order)

    def needed_cross(self, method: Method) -> Tensor:
        """G; QCompileError naming `method` where there is none."""
        if self.cross is None:
            raise QCompileError(f"{method} needs cross = X̂Xᵀ beside the Hessian; collect it, or use GPTQ")
        return self.cross

    def ordered(self, order: Tensor) -> Sums:
        """The sums of columns in another order."""
        cross = None if self.cross is None else _ordered(self.cross, order)
        return Sums(_ordered(self.hessian, order), cross, self.factors, order)


@dataclass(frozen=True, eq=False)
class Problem:
    """`base` and `anchor` [in, out] and `feedback` [in, in] of the recursion; `factored` where there is one."""

    base: Tensor
    anchor: Tensor
    feedback: Tensor
    factored: Factored | None


class Method(Protocol):
    """A way to round. Frozen; its options are its fields, and it prints as the call that makes it.

    `follows_float`: whether it aims at WX, the float stream's outputs, and not at WX̂; it then needs G.
    """

    follows_float: ClassVar[bool]

    @property
    def order(self) -> Order:
        """The order of columns that it asks for."""

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """What to hand to the recursion for Wᵀ `columns` [in, out]; columns of dead inputs are to become 0."""


def _ordered(matrix: Tensor, order: Tensor) -> Tensor:
    return matrix.index_select(0, order).index_select(1, order)
