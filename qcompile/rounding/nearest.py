"""Rounding to nearest: columns know nothing of each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from qcompile.rounding.method import Problem, Sums
from qcompile.rounding.order import Order


@dataclass(frozen=True)
class Nearest:
    """q_j = Q(w_j): M is 0. What is left to choose are the ranges; see `AwqClip`."""

    follows_float: ClassVar[bool] = False

    @property
    def order(self) -> Order:
        """It makes no difference."""
        return "none"

    def problem(self, columns: Tensor, sums: Sums) -> Problem:
        """See `Method`."""
        living = sums.alive(columns)
        return Problem(living, living, columns.new_zeros(()).expand(len(columns), len(columns)), None)
