"""Which channels a diagonal transformation may scale, which products read them, and why others are left alone."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, Role, find_contractions, roles
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces import ChannelSpaces, Level, Limit, Placement, Space
from qcompile.spaces.apply import Edits
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout
from qcompile.spaces.rules.products import part_of

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

    def of_weight(self, vector: Tensor) -> Tensor:
        """Entries of a vector along the weight's axis, as ``[copies, width]``."""
        return vector[torch.from_numpy(self.placement.positions)]

    def of_input(self, program: Program, vector: Tensor) -> Tensor:
        """Entries of a vector along the input's channels, as ``[copies, width]``; the weight may have more of them."""
        if self.product.groups > 1 and self.placement.use.axis == self.product.axis_in:  # not depthwise
            return self.of_weight(vector.reshape(self.product.groups, -1).amax(0))
        places = read_part(program, self.product)
        if places is None:
            return self.of_weight(vector)
        wide = vector.new_zeros(int(self.product.weight.meta["val"].shape[self.product.axis_in]))
        wide[torch.from_numpy(places)] = vector
        return self.of_weight(wide)


@dataclass(frozen=True, eq=False)
class Scalable:
    """A diagonal space with sources and products that read it."""

    space: Space
    readers: tuple[Reader, ...]
    inverse: Tensor  # bool [width]: where what the products read moves as the inverse of the space

    def divide(self, edits: Edits, factors: Tensor) -> None:
        """Divide what the products read by `factors` (float64 ``[width]``), and let their weights undo it."""
        edits.scale(self.space, torch.where(self.inverse, factors, factors.reciprocal()))


def scalable(program: Program, spaces: ChannelSpaces, reasons: dict[fx.Node, str]) -> list[Scalable]:
    """Diagonal spaces that begin at weights and end in products, in program order; `reasons` says what is not taken."""
    products = find_contractions(program)
    kinds, by_node = roles(program, products), {c.node: c for c in products}
    found = []
    for space in spaces[Level.DIAGONAL]:
        if not space.sinks or not any(p.use.weight is not None for p in space.sources):
            continue
        signs = np.concatenate([_inverse(p) for p in space.sinks])
        if (signs != signs[:1]).any():
            reasons |= {p.node: "another product reads its channels by the inverse of their scale" for p in space.sinks}
            continue
        readers = tuple(Reader(by_node[p.node], kinds[p.node], p) for p in space.sinks)
        found.append(Scalable(space, readers, torch.from_numpy(signs[0])))
    return found


def _inverse(placement: Placement) -> NDArray[np.bool_]:
    return np.zeros(placement.positions.shape, bool) if placement.inverse is None else placement.inverse


def read_part(program: Program, product: Contraction) -> Ids | None:
    """Where along the weight's input axis the channels lie that are read; None for all of them in order."""
    if product.groups > 1:
        return None
    size = product.input.meta["val"].shape[product.input_axis]
    places = part_of(program, product, product.axis_in, size)
    assert not isinstance(places, str)  # such a product has no sink
    return places


def safe(factors: Tensor) -> Tensor:
    """Factors as float64 with 1 in place of what is no positive number, and none beyond 1e±5."""
    wide = factors.double()
    return torch.where(wide.isfinite() & (wide > 0), wide.clamp(1 / _LARGEST, _LARGEST), 1.0)


def column_peaks(program: Program, weight: fx.Node, axis: int) -> Tensor:
    """max |W| of each index of one axis: float64; 0 where there is nothing."""
    tensor = program.weight(weight)
    if tensor.numel() == 0:
        return torch.zeros(tensor.shape[axis], dtype=torch.float64)
    return tensor.abs().amax([i for i in range(tensor.ndim) if i != axis]).double()


def tell_left_alone(
    spaces: ChannelSpaces,
    products: Iterable[Contraction],
    scaled: Collection[Space],
    reasons: Mapping[fx.Node, str],
    report: Report,
) -> None:
    """Report every product some of whose input channels are in none of the `scaled` spaces.

    `reasons`: why the pass itself passed a product over; for others it is the operator that forbids to scale.
    """
    covered, stops = covered_positions(scaled), _stops(spaces)
    sinks = {use.node: use for use in spaces.uses if use.kind == "sink"}
    for product in products:
        use, own = sinks.get(product.node), reasons.get(product.node)
        if use is None:
            stop = stops.get(product.node) or stops.get(product.input)
            reason = f"what it reads has no channels left behind {stop}" if stop else "no weight makes what it reads"
            report.skip(product.node, own or reason)
            continue
        left, all_ = np.delete(use.ids, covered.get(product.node, [])), use.ids[use.ids >= 0]
        left = left[left >= 0]  # -1: entries of the weight that are not read
        if left.size:
            some = "" if left.size == all_.size else f"{left.size} of its {all_.size} input channels: "
            limits = "; ".join(dict.fromkeys(str(limit) for limit in spaces.limits(Level.DIAGONAL, left)[:3]))
            report.skip(product.node, some + (own or limits or "its channels line up with no weight's"))


def _stops(spaces: ChannelSpaces) -> dict[fx.Node, Limit]:
    """For operators whose channels are not followed on, the last one before them, or themselves, that ends channels."""
    limits = (spaces.wires.events[event] for _, event in spaces.wires.restricted(Level.DIAGONAL))
    found = {limit.node: limit for limit in limits}
    for node in spaces.program.nodes:
        layout = spaces.layouts.get(node)
        if node not in found and (not isinstance(layout, Layout) or not layout.has_wires):
            before = next((found[n] for n in node.all_input_nodes if n in found), None)
            if before is not None:
                found[node] = before
    return found


def covered_positions(scaled: Collection[Space]) -> dict[fx.Node, Ids]:
    """For each product, the positions along its weight's axis that are in one of the spaces."""
    covered: dict[fx.Node, list[Ids]] = {}
    for space in scaled:
        for placement in space.sinks:
            covered.setdefault(placement.node, []).append(placement.positions.ravel())
    return {node: np.concatenate(positions) for node, positions in covered.items()}
