"""Which rows of an input each expert of a stack sees, read off the graph as `routing` reads it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction
from qcompile.ir.program import Program
from qcompile.passes.quantize.routing import chosen

aten = torch.ops.aten


@dataclass(frozen=True)
class Dealing:
    """How the rows of an input, features in `axis`, fall to `experts`.

    - ``index``: the value `decider` names the expert of each row, or of each run of rows of equal length;
    - ``offsets``: the rows of an expert end where `decider` says;
    - ``part``: all rows are of expert `number`;
    - ``stack``: the first axis counts experts; rows of zeros are of none.
    """

    kind: Literal["index", "offsets", "part", "stack"]
    experts: int
    axis: int
    decider: str | None = None
    number: int = 0

    @property
    def lines_up(self) -> bool:
        """Whether rows of two programs that deal in this way stand in one order, however they are dealt."""
        return self.kind in ("index", "stack")

    def lined_up(self, x: Tensor, decider: Tensor | None, other: Tensor, other_decider: Tensor | None) -> Tensor:
        """`other`, the same input in another program, with the row of `x` where that program has none of its expert."""
        flat, rows = (t.movedim(self.axis, -1).reshape(-1, t.shape[self.axis]) for t in (x, other))
        if self.kind == "stack":
            alike = (flat != 0).any(1) & (rows != 0).any(1)
        else:
            assert decider is not None
            assert other_decider is not None
            alike = self._owners(decider, len(flat)) == self._owners(other_decider, len(flat))
        found = torch.where(alike.unsqueeze(1), rows, flat)
        moved = x.movedim(self.axis, -1)
        return found.view(moved.shape).movedim(-1, self.axis)

    def _owners(self, decider: Tensor, rows: int) -> Tensor:
        """The expert of each row, where they are named one by one or run by run."""
        owner = decider.reshape(-1).remainder(self.experts)
        return owner.repeat_interleave(rows // len(owner))

    def rows(self, x: Tensor, decider: Tensor | None) -> dict[int, Tensor]:
        """Expert → its rows ``[tokens, features]``; experts without any may be missing."""
        moved = x.movedim(self.axis, -1)
        flat = moved.reshape(-1, moved.shape[-1])
        if self.kind == "part":
            return {self.number: flat}
        if self.kind == "stack":
            parts = moved.reshape(self.experts, -1, moved.shape[-1])
            return {e: part[(part != 0).any(1)] for e, part in enumerate(parts)}
        assert decider is not None
        if self.kind == "offsets":
            ends = decider.tolist()
            return {e: flat[a:b] for e, (a, b) in enumerate(zip([0, *ends], ends, strict=False)) if b > a}
        owner = self._owners(decider, len(flat))
        return {e: flat[owner == e] for e in sorted(set(owner.tolist()))}


def dealing(program: Program, c: Contraction) -> Dealing | None:
    """How the rows of the input of a product with a stack of weights are dealt; None where that cannot be read."""
    assert c.experts is not None
    count = c.weight.meta["val"].shape[c.experts]
    for position, move in enumerate(c.path):
        index, number = chosen(program, c, position, move)
        if index is not None:
            return Dealing("index", count, c.input_axis, index.name)
        if number is not None:
            return Dealing("part", count, c.input_axis, number=number % count)
    if "grouped_mm" in c.op and isinstance(offsets := program.arg(c.node, "offs"), fx.Node):
        return Dealing("offsets", count, c.input_axis, offsets.name)
    if c.node.target in (aten.bmm.default, aten.baddbmm.default) and c.input_axis != 0:
        return Dealing("stack", count, c.input_axis)
    return None
