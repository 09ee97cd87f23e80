"""Leaving padding out of what is measured on activations.

    x [batch, sequence, …], mask [batch, sequence]   ⟶   x [1, tokens, …]
    x [batch·sequence, …]                            ⟶   x [tokens, …]

Which axes of a value run over tokens is read off its symbolic sizes; of a program of fixed sizes, its first axes count
where they are as long as the tokens'.
"""

from __future__ import annotations

import sympy
from torch import Tensor, fx

from qcompile.ir.contractions import find_contractions, roles
from qcompile.ir.program import Program
from qcompile.ir.types import Dim, dim_expr


class Padding:
    """Picks the tokens out of a program's values; `whole` names those of which it could not.

    Experts are given tokens in an order of their own, so that what they read keeps its padding.
    """

    def __init__(self, program: Program) -> None:
        self.whole: dict[str, str] = {}  # node → why its padding is counted
        self._program = program
        self._experts: set[fx.Node] | None = None
        sizes = {node.name: _sizes(node) for node in program.inputs}
        ids, mask = sizes.get("input_ids", ()), sizes.get("attention_mask", ())
        self._batch, self._sequence = ids if len(ids) == 2 else (0, 0)
        self._all = mask[1] if len(mask) == 2 else self._sequence

    def tokens_of(self, node: fx.Node, value: Tensor, mask: Tensor | None) -> Tensor:
        """`value` without its padded tokens, of the same rank; all of it where there is no mask.

        Args:
            node: the node of the program whose value it is.
            mask: bool ``[batch, length]``, as `token_mask` gives it.
        """
        if mask is None:
            return value
        axes = None if self._of_experts(node) else self._axes(node, value, mask)
        if axes is None:
            why = "experts read it" if self._of_experts(node) else "its axes do not say which rows are which tokens"
            self.whole[node.name] = f"{self._program.module_of(node) or node.name}: {why}"
            return value
        chosen = mask.to(value.device)
        if len(axes) == 1:
            return value.movedim(axes[0], 0)[chosen.flatten()].movedim(0, axes[0])
        return value.movedim(axes, (0, 1))[chosen].unsqueeze(0).movedim((0, 1), axes)

    def notes(self) -> list[str]:
        """A line for a report, where padding was counted."""
        if not self.whole:
            return []
        places = list(dict.fromkeys(self.whole.values()))
        more = f" and {len(places) - 4} more" if len(places) > 4 else ""
        return [f"padding counts in {len(self.whole)} values ({'; '.join(places[:4])}{more})"]

    def _axes(self, node: fx.Node, value: Tensor, mask: Tensor) -> tuple[int, ...] | None:
        """The axes of batch and sequence, or the one axis of both."""
        sizes = _sizes(node)
        if isinstance(self._batch, sympy.Expr) and isinstance(self._sequence, sympy.Expr):
            batches = [i for i, size in enumerate(sizes) if size == self._batch]
            for length in (self._sequence, self._all):
                both = [i for i, size in enumerate(sizes) if size == self._batch * length]
                lengths = [i for i, size in enumerate(sizes) if size == length]
                if len(both) == 1 and value.shape[both[0]] == mask.numel():
                    return (both[0],)
                if len(batches) == len(lengths) == 1 and value.shape[lengths[0]] == mask.shape[1]:
                    return (batches[0], lengths[0])
            return None
        if value.shape[:2] == mask.shape:
            return (0, 1)
        return (0,) if value.ndim and value.shape[0] == mask.numel() else None

    def _of_experts(self, node: fx.Node) -> bool:
        if self._experts is None:
            products = find_contractions(self._program)
            kinds = roles(self._program, products)
            self._experts = {c.input for c in products if c.experts is not None or kinds[c.node] == "expert"}
        return node in self._experts


def _sizes(node: fx.Node) -> tuple[Dim, ...]:
    value = node.meta["val"]
    return tuple(map(dim_expr, value.shape)) if isinstance(value, Tensor) else ()
