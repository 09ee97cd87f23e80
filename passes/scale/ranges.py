"""Ranges of weights along the channels of a space, as they are while factors are still being looked for."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, Embedding, survey
from qcompile.ir.program import Program
from qcompile.spaces import Placement, Space

aten = torch.ops.aten

Measure = Literal["absmax", "rms"]

_GAINED = (
    aten.rms_norm.default,
    aten.layer_norm.default,
    aten.group_norm.default,
    aten.batch_norm.default,
    aten._native_batch_norm_legit_no_training.default,
)


@dataclass(frozen=True, eq=False)
class Part:
    """A weight in a space: where its factor is the inverse of the space's, and whether its range counts."""

    placement: Placement
    down: Tensor  # bool [copies, width]
    counts: bool


@dataclass(frozen=True, eq=False)
class Sides:
    """A space and the weights on both of its sides."""

    space: Space
    parts: tuple[Part, ...]

    @property
    def counted(self) -> list[Part]:
        """The weights whose ranges are evened out."""
        return [part for part in self.parts if part.counts]


def sides_of(program: Program, spaces: Sequence[Space], norms: bool) -> tuple[list[Sides], dict[fx.Node, str]]:
    """Spaces with weights on both sides; for products that read another, why it is passed over.

    Matrices of products and tables of embeddings count; with `norms`, gains of norms do too. Biases never do.
    """
    matrices = {found.node for found in survey(program) if isinstance(found, Contraction | Embedding)}
    taken: list[Sides] = []
    reasons: dict[fx.Node, str] = {}
    for space in spaces:
        parts = []
        for p in space.placements:
            if p.use.weight is not None:
                counts = p.node in matrices or (norms and _is_gain(program, p.use.weight))
                parts.append(Part(p, _down(p), counts))
        sides = Sides(space, tuple(parts))
        if any(not bool(p.down.all()) for p in sides.counted) and any(bool(p.down.any()) for p in sides.counted):
            taken.append(sides)
        else:
            why = "only gains of norms make its channels" if not norms else "no weight with a range makes its channels"
            reasons |= {p.node: why + ("; norms=true lets them count" if not norms else "") for p in space.sinks}
    return taken, reasons


def _down(placement: Placement) -> Tensor:
    inverse = np.zeros(placement.positions.shape, bool) if placement.inverse is None else placement.inverse
    return torch.from_numpy(inverse ^ (placement.use.kind == "sink"))


def _is_gain(program: Program, weight: fx.Node) -> bool:
    """Whether a norm, or a product of elements, multiplies by it."""
    return any(
        user.target is aten.mul.Tensor or (user.target in _GAINED and program.arg(user, "weight") is weight)
        for user in weight.users
    )


@dataclass
class Simulation:
    """The weights of a program, times the factors found so far; the program is not changed."""

    program: Program
    measure: Measure
    factors: dict[tuple[fx.Node, fx.Node], dict[int, Tensor]] = field(default_factory=lambda: defaultdict(dict))

    def step(self, sides: Sides) -> Tensor:
        """s = √(range of what divides / range of what multiplies), float64 ``[width]``; 1 where either is 0."""
        up = torch.zeros(sides.space.width, dtype=torch.float64)
        down = torch.zeros_like(up)
        for part in sides.counted:
            ranges = self._ranges(part.placement)
            up = torch.maximum(up, ranges.masked_fill(part.down, 0.0).amax(0))
            down = torch.maximum(down, ranges.masked_fill(~part.down, 0.0).amax(0))
        s = (down / up).sqrt()
        return torch.where((up > 0) & (down > 0) & s.isfinite() & (s > 0), s, 1.0)

    def scale(self, sides: Sides, step: Tensor) -> None:
        """Multiply the channels of a space by `step`."""
        for part in sides.parts:
            use = part.placement.use
            assert use.weight is not None
            held = self.factors[use.weight, use.node]
            size = (use.view or tuple(use.weight.meta["val"].shape))[use.axis]
            along = held.setdefault(use.axis, torch.ones(size, dtype=torch.float64))
            along[torch.from_numpy(part.placement.positions)] *= torch.where(part.down, step.reciprocal(), step)

    def _ranges(self, placement: Placement) -> Tensor:
        """The range of each channel, float64 ``[copies, width]``."""
        use = placement.use
        assert use.weight is not None
        tensor = self.program.weight(use.weight)
        tensor = tensor if tensor.dtype == torch.float64 else tensor.float()
        tensor = tensor.reshape(use.view or tensor.shape)
        for axis, factors in self.factors[use.weight, use.node].items():
            tensor = tensor * factors.to(tensor).reshape([-1 if i == axis else 1 for i in range(tensor.ndim)])
        rows = tensor.movedim(use.axis, 0).reshape(tensor.shape[use.axis], -1)
        if rows.shape[1] == 0:  # of a product that makes nothing, or reads nothing
            ranges = rows.new_zeros(len(rows))
        else:
            ranges = rows.abs().amax(1) if self.measure == "absmax" else rows.square().mean(1).sqrt()
        return ranges.double()[torch.from_numpy(placement.positions)]
