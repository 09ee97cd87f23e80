"""The order in which columns are rounded: those that matter most first, while errors can still be made up for."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

Order: TypeAlias = Literal["none", "act", "group"]
"""`none`: as they stand. `act`: by falling diagonal of H, whatever the groups (static groups only). `group`: groups by
their largest diagonal, and columns by theirs inside a group, so that groups stay whole (group-aware reordering)."""


_ROWS = 64


def column_order(order: Order, diagonal: Tensor, group_of: Tensor) -> Tensor | None:
    """The columns [in] in the order of their turns, for the diagonal of H and the group of each column, both [in].

    None for `none`. Equal entries keep their order.
    """
    match order:
        case "none":
            return None
        case "act":
            return torch.argsort(diagonal, descending=True, stable=True)
        case "group":
            return group_order(diagonal, group_of)


def ordered(matrix: Tensor, order: Tensor) -> Tensor:
    """A matrix [n, n] with its rows and its columns in another order, some rows at once: they stay in the cache."""
    found = torch.empty_like(matrix)
    for start in range(0, len(order), _ROWS):
        here = slice(start, start + _ROWS)
        torch.index_select(matrix[order[here]], 1, order, out=found[here])
    return found


def group_order(diagonal: Tensor, group_of: Tensor) -> Tensor:
    """Groups by their largest entry of `diagonal`, columns by their own within each; both falling."""
    groups = int(group_of.max()) + 1 if len(group_of) else 0
    top = diagonal.new_zeros(groups).scatter_reduce(0, group_of, diagonal, "amax")
    place = torch.empty(groups, dtype=torch.int64, device=diagonal.device)
    place[torch.argsort(top, descending=True, stable=True)] = torch.arange(groups, device=diagonal.device)
    within = torch.argsort(diagonal, descending=True, stable=True)
    return within[torch.argsort(place[group_of[within]], stable=True)]
