"""The one recursion behind every method that rounds columns in order:

    x_j = base_j + Σ_{k<j} M_jk (anchor_k - q_k),    q_j = round(x_j)

Methods differ in base, anchor and M. Columns are halved again and again: the first half is rounded, one matrix product
takes what it leaves behind to the second half, and that is rounded. So nearly all work is in large products, with one
matrix-vector product a column inside the last few.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from qcompile.linalg import product, solve_lower

LEAF = 16
"""Columns that are not halved any more."""


class Columns(Protocol):
    """What rounds columns: a grid, or one with a state of its own."""

    @property
    def running(self) -> int | None:
        """Columns that `open` sees, each time so many have been rounded; None where it needs to see none."""

    def open(self, first: int, columns: Tensor) -> None:
        """The next `columns` [k, out], from column `first`, as they are if none of them leaves an error behind."""

    def column(self, x: Tensor, column: int, out: Tensor) -> None:
        """Round `x` [out], the values of `column`, into `out`; called once a column, in order."""


def recurse(base: Tensor, anchor: Tensor, feedback: Tensor, columns: Columns, leaf: int = LEAF) -> Tensor:
    """The rounded values [in, out] for `base` and `anchor` [in, out] and `feedback` M [in, in], of one float dtype.

    Only the strictly lower triangle of M is read.
    """
    state = _State(feedback, columns, leaf, base.clone(), anchor, torch.empty_like(base))
    state.solve(0, len(base))
    return state.values


@dataclass(frozen=True, eq=False)
class _State:
    """`x` [in, out]: base and what reached it so far; anchor - value where a column has been rounded."""

    feedback: Tensor
    columns: Columns
    leaf: int
    x: Tensor
    anchor: Tensor
    values: Tensor

    def solve(self, first: int, last: int) -> None:
        """Round columns first … last - 1, which all earlier ones have reached."""
        size, running = last - first, self.columns.running
        if size == running:
            self.columns.open(first, self.ahead(first, last))
        # Halves hold whole running groups, and whole leaves inside them.
        unit = running if running is not None and size > running else self.leaf
        if size <= unit:
            self.each(first, last)
            return
        middle = first + -(-size // unit) // 2 * unit
        self.solve(first, middle)
        self.x[middle:last] += product(self.feedback[middle:last, first:middle], self.x[first:middle])
        self.solve(middle, last)

    def each(self, first: int, last: int) -> None:
        """Round a few columns one by one."""
        # Views are made at once: one by one they would cost as much as the arithmetic.
        xs, values, anchors = (t[first:last].unbind(0) for t in (self.x, self.values, self.anchor))
        left, weights = self.x[first:last].t(), self.feedback[first:last, first:last].unbind(0)
        for i, x in enumerate(xs):
            if i:
                x.addmv_(left[:, :i], weights[i][:i])
            self.columns.column(x, first + i, values[i])
            torch.sub(anchors[i], values[i], out=x)

    def ahead(self, first: int, last: int) -> Tensor:
        """Columns first … last - 1 where each is taken as it comes: y_j = x_j + Σ_{first≤k<j} M_jk (anchor_k - y_k)."""
        within = self.feedback[first:last, first:last]
        right = self.x[first:last] + product(within.tril(-1), self.anchor[first:last])
        return solve_lower(within, right, unit=True)
