"""Products of rows with the matrices that were picked for them, without a copy of a matrix for each row.

    bmm(w[index], x)  ⟶  for each expert e: w[e] · the x of its rows    w [experts, a, b], index [rows], x [rows, b, m]

An exported mixture of experts says the former, which takes a whole matrix of memory and traffic for every token.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.linalg import product

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Gathered:
    """w[index], not looked up yet."""

    weight: Tensor
    index: Tensor

    @property
    def whole(self) -> Tensor:
        """The tensor that it stands for ``[rows, a, b]``."""
        return self.weight[self.index]

    def products(self, others: Tensor, turned: bool) -> Tensor:
        """w[index] @ `others` [rows, b, m], or where `turned` `others` [rows, m, a] @ w[index]."""
        rows = others if turned else others.transpose(1, 2)  # [rows, m, summed over]
        columns = self.weight.shape[2 if turned else 1]
        found = rows.new_empty(len(rows), rows.shape[1], columns)
        owner = self.index.remainder(len(self.weight))
        for expert in torch.unique(owner).tolist():
            mine = (owner == expert).nonzero()[:, 0]
            weight = self.weight[expert] if turned else self.weight[expert].t()
            flat = rows[mine].reshape(-1, rows.shape[2])
            found[mine] = product(flat, weight).view(len(mine), rows.shape[1], columns)
        return found if turned else found.transpose(1, 2)


def call(node: fx.Node, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What a node computes from its arguments, some of which may be `Gathered`; it may give one, to a bmm alone."""
    if node.target is aten.index.Tensor and not kwargs and _pays(node, *args):
        return Gathered(args[0], args[1][0])
    if node.target is aten.bmm.default:
        left, right = args
        if isinstance(left, Gathered):
            return left.products(right.whole if isinstance(right, Gathered) else right, False)
        if isinstance(right, Gathered):
            return right.products(left, True)
    target: Callable[..., Any] = node.target  # type: ignore[assignment]
    return target(*args, **kwargs)


def _pays(node: fx.Node, weight: Tensor, index: Sequence[Tensor | None]) -> bool:
    """Whether matrices are picked for more rows than there are matrices, and only products read them."""
    return (
        len(index) == 1
        and index[0] is not None
        and (weight.ndim, index[0].ndim) == (3, 1)
        and index[0].dtype == torch.int64
        and len(index[0]) > len(weight)
        and all(user.target is aten.bmm.default for user in node.users)
    )
