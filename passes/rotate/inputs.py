"""Rotate what a product reads when the model runs, and its weight to fit.

    z = linear(x, W)          ⟶      z = linear(hadamard(x), W·Tᵀ)

Exact. Products that read one tensor share one transform, and a weight that several products read is edited once where
all of them are rotated; else it is parted, which the report says.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.hadamard.construct import HadamardError, hadamard_for
from qcompile.hadamard.rotation import Hadamard, Rotation
from qcompile.ir.contractions import Contraction
from qcompile.ir.edits import WeightEdit
from qcompile.ir.moves import axis_back, moved, readers
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces.apply import part_weight
from qcompile.spaces.rules.products import part_of

TRANSFORM = torch.ops.qcompile.hadamard.default


@dataclass(frozen=True, eq=False)
class Place:
    """Products that read the same channels: `x`, whose last axis they are, and who reads it on the way to them."""

    x: fx.Node
    followers: tuple[fx.Node, ...]
    products: tuple[Contraction, ...]
    order: int  # of the base matrix
    size: int  # of the transform


def rotate_inputs(program: Program, products: Iterable[Contraction], block: int | None, report: Report) -> int:
    """Rotate the inputs of `products`. Returns how many transforms the program has more; the rest is in the report."""
    groups: dict[tuple[fx.Node, int], list[Contraction]] = {}
    for c in products:
        groups.setdefault((c.input, c.input_axis), []).append(c)
    places: list[Place] = []
    for (x, axis), same in groups.items():
        place = _place(program, x, axis, same, block)
        for c in same:
            if isinstance(place, str):
                report.skip(c.node, place)
            else:
                report.rewrote(c.node, f"its input is rotated online, {place.size} channels at a time")
        if isinstance(place, Place):
            places.append(place)
    _rotate_weights(program, places, report)
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    for place in places:
        first = min(place.followers, key=order.__getitem__)
        module = program.module_of(place.products[0].node)
        online = program.call(TRANSFORM, (place.x, place.order, place.size), before=first, module=module)
        for follower in place.followers:
            follower.replace_input_with(place.x, online)
    return len(places)


def _place(program: Program, x: fx.Node, axis: int, same: list[Contraction], block: int | None) -> Place | str:
    """Where to rotate what some products read; the reason why that is not possible."""
    x, axis, followers = _before_moves(program, x, axis, same)
    width = x.meta["val"].shape[axis]
    if not isinstance(width, int) or axis != x.meta["val"].ndim - 1:
        return "the channels of its input are not the last axis, or of no fixed width"
    if any("qcompile" in str(step.target) for c in same for step in c.path):
        return "its weight is quantized already"
    if any(c.groups > 1 for c in same):
        return "it convolves groups of channels"
    if not all(_in_blocks(program, c, width) for c in same):
        return "it reads a part of its weight that is no run of blocks"
    try:
        order, size = hadamard_for(width, block)
    except HadamardError as error:
        return str(error)
    return Place(x, tuple(followers), tuple(same), order, size)


def _in_blocks(program: Program, c: Contraction, width: int) -> bool:
    """Whether the input's channels are the weight's axis, or one of several runs of it, each for an expert."""
    places = part_of(program, c, c.axis_in, width)
    if places is None or isinstance(places, str):
        return places is None
    return np.array_equal(places.ravel(), np.arange(c.weight.meta["val"].shape[c.axis_in]))


def _rotate_weights(program: Program, places: list[Place], report: Report) -> None:
    wanted: dict[fx.Node, dict[tuple[int, int], list[fx.Node]]] = {}
    for place in places:
        for c in place.products:
            wanted.setdefault(c.weight, {}).setdefault((c.axis_in, place.size), []).append(c.node)
    for weight, wishes in wanted.items():
        rotated = {node for nodes in wishes.values() for node in nodes}
        kept = [reader for reader in readers(weight) if reader not in rotated]
        groups = list(wishes.items())
        parted = groups if kept else groups[1:]  # what is not rotated keeps the weight as it is
        copies = {key: part_weight(program, weight, nodes, report) for key, nodes in parted}
        for (axis, size), _ in groups:
            own = copies.get((axis, size), weight)
            program.edit_weight(own, Rotated(axis, Hadamard(own.meta["val"].shape[axis], size)))


@dataclass(frozen=True, eq=False)
class Rotated(WeightEdit):
    """A weight rotated along one axis."""

    axis: int
    rotation: Rotation

    def apply(self, tensor: Tensor) -> Tensor:
        """The weight after the rotation."""
        return self.rotation.apply(tensor, self.axis)

    def apply_into(self, tensor: Tensor, spare: Tensor) -> Tensor:
        """As `apply`, in the memory of these two where that can be."""
        return self.rotation.apply_into(tensor, self.axis, spare)


def _before_moves(
    program: Program, x: fx.Node, axis: int, same: list[Contraction]
) -> tuple[fx.Node, int, list[fx.Node]]:
    """Where the channels are the last axis: what `x` is moved from, and who reads that on the way to the products."""
    followers = [c.node for c in same]
    while axis != x.meta["val"].ndim - 1 and len(x.users) == len(followers):
        source = moved(program, x)
        back = axis_back(program, x, axis) if source is not None else None
        if source is None or back is None or source.meta["val"].shape[back] != x.meta["val"].shape[axis]:
            break
        x, axis, followers = source, back, [x]
    return x, axis, followers
