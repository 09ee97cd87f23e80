"""What a method is given, and what it hands to the recursion."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Protocol

from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.rounding.factor import Factored, Factors
from qcompile.rounding.order import Order, ordered


@dataclass(frozen=True, eq=False)
class Sums:
    """Second moments of a layer's inputs: `given_hessian` H = X̂X̂ᵀ and, where the float stream's inputs X are known
    too, `given_cross` G = X̂Xᵀ; both [in, in], of one scale. `order` [in]: the order that columns are taken in, None as
    they stand. `factors`: what is known of H already.
    """

    given_hessian: Tensor
    given_cross: Tensor | None
    factors: Factors | None = None
    order: Tensor | None = None

    @cached_property
    def hessian(self) -> Tensor:
        """H with its columns in their order."""
        return self.given_hessian if self.order is None else ordered(self.given_hessian, self.order)

    @cached_property
    def cross(self) -> Tensor | None:
        """G with its columns in their order."""
        known = self.given_cross
        return known if known is None or self.order is None else ordered(known, self.order)

    @property
    def diagonal(self) -> Tensor:
        """That of H, [in]."""
        diagonal = self.given_hessian.diagonal()
        return diagonal if self.order is None else diagonal[self.order]

    @property
    def dead(self) -> Tensor:
        """[in]: where nothing came in."""
        return self.diagonal == 0

    def alive(self, columns: Tensor) -> Tensor:
        """`columns` [in, out] with those of dead inputs 0."""
        dead = self.dead
        return columns.masked_fill(dead.unsqueeze(1), 0) if bool(dead.any()) else columns

    def factor(self, damping: float, unit: float | None = None) -> Factored:
        """H factored, as `factor` does; once for all that share `factors`."""
        known = self.factors or Factors()
        return known.of(self.given_hessian, damping, unit, self.order)

    def needed_cross(self, method: Method) -> Tensor:
        """G; QCompileError naming `method` where there is none."""
        if self.cross is None:
            raise QCompileError(f"{method} needs cross = X̂Xᵀ beside the Hessian; collect it, or use GPTQ")
        return self.cross

    def ordered(self, order: Tensor) -> Sums:
        """The sums of columns in another order."""
        return replace(self, order=order)


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
