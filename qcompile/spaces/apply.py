"""Apply transformations of spaces to the weights that they meet.

    source: W ← T·W along its axis        sink: W ← W·T⁻¹

Effects are gathered first and written by `Edits.commit`, one edit an axis of a weight. A weight that is read twice, as
an embedding that is the head too, is edited once where both readers want the same, and parted where they do not.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, fx

from qcompile.hadamard.rotation import Rotation
from qcompile.ir.edits import WeightEdit, same_memory
from qcompile.ir.moves import moved
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces.analysis import ChannelSpaces
from qcompile.spaces.forest import Ids
from qcompile.spaces.space import Placement, Space
from qcompile.spaces.walk import Use


@dataclass(frozen=True, eq=False)
class Effect:
    """What happens to some positions ``[copies, width]`` of one axis of a weight."""

    kind: Literal["rotate", "scale", "permute", "centre"]
    positions: Ids
    rotation: Rotation | None = None
    values: NDArray[np.float64] | Ids | None = None  # factors [copies, width], or the order [width]

    @property
    def key(self) -> tuple[object, ...]:
        """Equal for effects that do the same."""
        values = b"" if self.values is None else self.values.tobytes()
        return self.kind, self.positions.tobytes(), id(self.rotation), values

    def apply(self, tensor: Tensor, axis: int) -> Tensor:
        """The effect along one axis of a weight, of which these are some positions."""
        if self.kind == "scale":
            return tensor * self._factors(tensor, axis)
        axis %= tensor.ndim
        start, count = self._run, self.positions.size
        if start is not None:  # no copy to pick them
            part = self._part(tensor.narrow(axis, start, count).reshape(self._split(tensor, axis)), axis + 1)
            part = part.flatten(axis, axis + 1)
            if count == tensor.shape[axis]:
                return part
            behind = tensor.shape[axis] - start - count
            return torch.cat([tensor.narrow(axis, 0, start), part, tensor.narrow(axis, start + count, behind)], axis)
        index = torch.from_numpy(self.positions.ravel()).to(tensor.device)
        part = tensor.index_select(axis, index).reshape(self._split(tensor, axis))
        part = self._part(part, axis + 1).flatten(axis, axis + 1)
        return tensor.index_copy(axis, index, part)

    def apply_into(self, tensor: Tensor, axis: int, spare: Tensor) -> Tensor:
        """As `apply`, in the memory of these two, contiguous and of one shape, where that can be."""
        axis %= tensor.ndim
        if self.kind == "scale":
            return tensor.mul_(self._factors(tensor, axis))
        if self.rotation is None or self._run is None or self.positions.size < tensor.shape[axis]:
            return self.apply(tensor, axis)
        split = self._split(tensor, axis)
        return self.rotation.apply_into(tensor.view(split), axis + 1, spare.view(split)).reshape(tensor.shape)

    @cached_property
    def _run(self) -> int | None:
        """Where the positions begin if they are one run."""
        start = int(self.positions.flat[0])
        one = np.array_equal(self.positions.ravel(), np.arange(start, start + self.positions.size))
        return start if one else None

    def _split(self, tensor: Tensor, axis: int) -> list[int]:
        """The tensor's shape with the axis cut into copies of the space."""
        return [*tensor.shape[:axis], *self.positions.shape, *tensor.shape[axis + 1 :]]

    def _part(self, part: Tensor, axis: int) -> Tensor:
        if self.kind == "rotate":
            assert self.rotation is not None
            return self.rotation.apply(part, axis)
        if self.kind == "centre":
            return part - part.mean(axis, keepdim=True, dtype=torch.float64).to(part.dtype)
        return part.index_select(axis, torch.from_numpy(np.ascontiguousarray(self.values)).to(part.device))

    def _factors(self, tensor: Tensor, axis: int) -> Tensor:
        """A factor for every position of the axis, shaped to multiply the weight."""
        factors = np.ones(tensor.shape[axis])
        factors[self.positions] = self.values
        shape = [1] * tensor.ndim
        shape[axis] = -1
        return torch.from_numpy(factors).to(tensor).reshape(shape)


@dataclass(frozen=True, eq=False)
class Effects(WeightEdit):
    """Effects along one axis of a weight, one after the other."""

    axis: int
    effects: tuple[Effect, ...]

    def apply(self, tensor: Tensor) -> Tensor:
        """The weight after the effects."""
        for effect in self.effects:
            tensor = effect.apply(tensor, self.axis)
        return tensor

    def apply_into(self, tensor: Tensor, spare: Tensor) -> Tensor:
        """As `apply`, in the memory of these two where that can be."""
        pair = [tensor, spare]
        for effect in self.effects:
            tensor = effect.apply_into(tensor, self.axis, spare).contiguous()
            spare = pair[int(same_memory(tensor, pair[0]))]
        return tensor


@dataclass(frozen=True, eq=False)
class Viewed(WeightEdit):
    """An edit of a weight that is seen in another shape: a table of positions as one long vector."""

    inner: Effects
    view: tuple[int, ...]

    def apply(self, tensor: Tensor) -> Tensor:
        """The weight after the edit."""
        return self.inner.apply(tensor.reshape(self.view)).reshape(tensor.shape)


@dataclass
class Edits:
    """Effects on the weights of one program, as one analysis saw it."""

    spaces: ChannelSpaces
    report: Report
    pending: dict[Use, list[Effect]] = field(default_factory=lambda: defaultdict(list))

    @property
    def program(self) -> Program:
        """The program whose weights change."""
        return self.spaces.program

    def rotate(self, space: Space, rotation: Rotation) -> None:
        """T orthogonal, so T⁻ᵀ = T: the rows of sources and the columns of sinks move alike."""
        for p in self._weights(space):
            self.pending[p.use].append(Effect("rotate", p.positions, rotation=rotation))

    def scale(self, space: Space, factors: Tensor) -> None:
        """Channel j of the space times factors[j] (positive, float64)."""
        values = factors.double().numpy()
        for p in self._weights(space):
            inverse = np.zeros(p.positions.shape, bool) if p.inverse is None else p.inverse
            down = inverse ^ (p.use.kind == "sink")
            self.pending[p.use].append(Effect("scale", p.positions, values=np.where(down, 1 / values, values)))

    def permute(self, space: Space, order: Tensor) -> None:
        """Channel j of the space becomes what channel order[j] was."""
        for p in self._weights(space):
            self.pending[p.use].append(Effect("permute", p.positions, values=order.numpy()))

    def centre(self, placement: Placement) -> None:
        """Take the mean over the space's channels off a source."""
        self.pending[placement.use].append(Effect("centre", placement.positions))

    def multiply(self, placement: Placement, factors: Tensor) -> None:
        """Multiply one weight's channels only: the caller sees to the rest. `factors` has a number a channel."""
        wide = np.broadcast_to(factors.double().numpy(), placement.positions.shape)
        self.pending[placement.use].append(Effect("scale", placement.positions, values=wide))

    def _weights(self, space: Space) -> list[Placement]:
        return [p for p in space.placements if p.use.weight is not None]

    def commit(self) -> None:
        """Write every effect; weights whose readers want different things are parted first."""
        readers: dict[fx.Node, dict[fx.Node, list[Use]]] = defaultdict(lambda: defaultdict(list))
        touched = {use.weight for use in self.pending}
        for use in self.spaces.uses:
            if use.weight in touched and use.weight is not None:
                readers[use.weight][use.node].append(use)
        for weight, nodes in readers.items():
            groups: list[list[fx.Node]] = []
            for node, uses in nodes.items():
                fits = (g for g in groups if not any(self._clash(uses, nodes[other]) for other in g))
                group = next(fits, None)
                if group is None:
                    groups.append([node])
                else:
                    group.append(node)
            copies = [part_weight(self.program, weight, same, self.report) for same in groups[1:]]  # before any edit
            for own, same in zip([weight, *copies], groups, strict=True):
                self._write(own, [use for node in same for use in nodes[node]])
        self.pending.clear()

    def _clash(self, first: list[Use], second: list[Use]) -> bool:
        """Whether two readers want different things of entries of an axis that both read."""
        for axis, view in {(u.axis, u.view) for u in (*first, *second)}:
            mine, theirs = ([u for u in uses if (u.axis, u.view) == (axis, view)] for uses in (first, second))
            wishes = [{e.key for u in uses for e in self.pending.get(u, [])} for uses in (mine, theirs)]
            if wishes[0] != wishes[1] and (not mine or not theirs or _overlap(mine, theirs)):
                return True
        return False

    def _write(self, weight: fx.Node, uses: list[Use]) -> None:
        done: set[tuple[object, ...]] = set()
        for use in uses:
            effects = [e for e in merged(self.pending.get(use, [])) if (use.axis, *e.key) not in done]
            done |= {(use.axis, *e.key) for e in effects}
            if effects:
                edit = Effects(use.axis, tuple(effects))
                plain = use.view is None or use.view == tuple(weight.meta["val"].shape)
                self.program.edit_weight(weight, edit if plain else Viewed(None, edit, use.view or ()))


def _overlap(first: list[Use], second: list[Use]) -> bool:
    """Whether two readers read a common entry; a use that has wires everywhere reads them all."""
    whole = any((u.ids >= 0).all() for u in (*first, *second))
    return whole or any(bool(((a.ids >= 0) & (b.ids >= 0)).any()) for a in first for b in second)


def merged(effects: list[Effect]) -> list[Effect]:
    """Effects of one kind on different positions of an axis, as few as possible."""
    groups: dict[tuple[object, ...], list[Effect]] = defaultdict(list)
    for effect in effects:
        fixed = effect.values.tobytes() if effect.kind == "permute" and effect.values is not None else b""
        groups[effect.kind, id(effect.rotation), effect.positions.shape[1], fixed].append(effect)
    result = []
    for same in groups.values():
        first = same[0]
        values = first.values
        if first.kind == "scale":
            values = np.concatenate([np.asarray(e.values) for e in same])
        positions = np.concatenate([e.positions for e in same])
        order = np.argsort(positions[:, 0])  # heads that fill an axis are one run of it
        values = values[order] if first.kind == "scale" and values is not None else values
        result.append(Effect(first.kind, positions[order], first.rotation, values))
    return result


def part_weight(program: Program, weight: fx.Node, readers: list[fx.Node], report: Report) -> fx.Node:
    """Give `readers` a copy of a weight that others go on reading; says in the report what it costs."""
    key = program.key(weight)
    name, number = f"{key}.untied", 2
    while name in program.weights:
        name, number = f"{key}.untied{number}", number + 1
    copy = program.copy_weight(weight, name)
    copies: dict[fx.Node, fx.Node] = {weight: copy}
    for reader in readers:
        _reread(program, reader, copies)
    size = program.weights.nbytes(name) / 1e6
    report.note(f"{key!r} is untied for {', '.join(n.name for n in readers)}: {size:.1f} MB more")
    return copy


def _reread(program: Program, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> None:
    """Let a reader, and the moves between, read the copy."""
    for argument in node.all_input_nodes:
        if argument not in copies and _from_any(program, argument, copies):
            args, kwargs = (fx.map_arg(a, lambda n: n) for a in (argument.args, argument.kwargs))
            copy = program.call(argument.target, args, kwargs, before=node, module=program.module_of(argument))  # type: ignore[arg-type]
            _reread(program, copy, copies)
            copies[argument] = copy
    node.args = fx.map_arg(node.args, lambda n: copies.get(n, n))
    node.kwargs = fx.map_arg(node.kwargs, lambda n: copies.get(n, n))


def _from_any(program: Program, node: fx.Node, weights: dict[fx.Node, fx.Node]) -> bool:
    """Whether moves alone lead from one of `weights` to a node."""
    source = moved(program, node)
    while source is not None and source not in weights:
        source = moved(program, source)
    return source is not None
