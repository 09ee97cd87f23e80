"""Which channels a diagonal transformation may scale, which products read them, and why others are left alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, Role, find_contractions, roles
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces import ChannelSpaces, Level, Placement, Space
from qcompile.spaces.walk import Use
from qcompile.spaces.wires import Ids

QUANTIZED_ROLES: tuple[Role, ...] = ("linear", "expert", "convolution")
"""Products that recipes quantize unless they say otherwise: heads and routers stay float."""

_LARGEST = 1e5  # a factor beyond it says that a channel is next to dead


@dataclass(frozen=True, eq=False)
class Reader:
    """A product that reads channels of a space."""

    product: Contraction
    role: Role
    placement: Placement

    @property
    def input(self) -> tuple[fx.Node, int]:
        """The tensor that is read, and its axis of channels."""
        return self.product.input, self.product.input_axis

    def channels(self, vector: Tensor) -> Tensor:
        """Entries of a vector along the weight's axis (or the input's), as ``[copies, width]``."""
        return vector[torch.from_numpy(self.placement.positions)]


@dataclass(frozen=True, eq=False)
class Scalable:
    """A diagonal space with sources and products that read it."""

    space: Space
    readers: tuple[Reader, ...]


def scalable(program: Program, spaces: ChannelSpaces) -> list[Scalable]:
    """Diagonal spaces that begin at weights and end in products, in program order."""
    products = find_contractions(program)
    kinds, by_node = roles(program, products), {c.node: c for c in products}
    found = []
    for space in spaces[Level.DIAGONAL]:
        if not space.sinks or not any(p.use.weight is not None for p in space.sources):
            continue
        readers = tuple(Reader(by_node[p.node], kinds[p.node], p) for p in space.sinks)
        found.append(Scalable(space, readers))
    return found


def safe(factors: Tensor) -> Tensor:
    """Factors as float64 with 1 in place of what is no positive number, and none beyond 1e±5."""
    wide = factors.double()
    return torch.where(wide.isfinite() & (wide > 0), wide.clamp(1 / _LARGEST, _LARGEST), 1.0)


def peaks_of_weight(program: Program, reader: Reader) -> Tensor:
    """max |W| of each channel of the space, over its copies: float64 ``[width]``."""
    weight, axis = program.weight(reader.product.weight), reader.placement.use.axis
    others = [i for i in range(weight.ndim) if i != axis]
    return reader.channels(weight.abs().amax(others).double()).amax(0)


def tell_left_alone(
    spaces: ChannelSpaces, products: Iterable[Contraction], scaled: Collection[Space], reasons: Mapping[fx.Node, str], report: Report
) -> None:
    """Report every product some of whose input channels are in none of the `scaled` spaces.

    `reasons`: why the pass itself passed a product over; for others it is the operator that forbids to scale.
    """
    covered = covered_positions(scaled)
    sinks = {use.node: use for use in spaces.uses if use.kind == "sink"}
    for product in products:
        use, own = sinks.get(product.node), reasons.get(product.node)
        if use is None:
            report.skip(product.node, own or "what it reads starts at no weight that could be scaled")
            continue
        left = np.delete(use.ids, covered.get(use, []))
        if left.size:
            some = "" if left.size == use.ids.size else f"{left.size} of its {use.ids.size} input channels: "
            limits = "; ".join(dict.fromkeys(str(limit) for limit in spaces.limits(Level.DIAGONAL, left)[:3]))
            report.skip(product.node, some + (own or limits or "its channels do not line up with those that weights make"))


def covered_positions(scaled: Collection[Space]) -> dict[Use, Ids]:
    """For each sink, the positions along its weight's axis that are in one of the spaces."""
    covered: dict[Use, list[Ids]] = {}
    for space in scaled:
        for placement in space.sinks:
            covered.setdefault(placement.use, []).append(placement.positions.ravel())
    return {use: np.concatenate(positions) for use, positions in covered.items()}

