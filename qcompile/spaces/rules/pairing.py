"""A product of two activations, axis by axis."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from torch import fx

from qcompile.ir.types import Dim
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Axis, Layout, plain
from qcompile.spaces.rules.broadcast import is_one
from qcompile.spaces.walk import Kind, Use, Walk, sizes
from qcompile.spaces.wires import EVERY, MIXING, Level


@dataclass(frozen=True, eq=False)
class Operand:
    """A tensor and a label for each of its axes; equal labels are one axis."""

    layout: Layout
    labels: list[str]


def multiplied(walk: Walk, node: fx.Node, left: Operand, right: Operand, out: list[str]) -> Layout | list[Layout]:
    """The layout of the sum over all labels that `out` lacks."""
    spread = _spread(left, right, out)
    if spread is None:
        return _apart(walk, node, left, right, "multiplies tensors whose merged axes do not line up")
    (a, b), names, places = spread
    if not left.layout.has_wires and not right.layout.has_wires:
        return plain(sizes(node))
    summed = [i for i, name in enumerate(names) if name.split(".")[0] not in out]
    inside = [any(x.ids.shape[i] > 1 for i in summed) for x in (a, b)]
    if all(inside):
        return _paired(walk, node, a.ids, b.ids, summed)
    carried = [x.has_wires for x in (a, b)]
    if any(inside) or all(carried):
        reason = "multiplies channels with what no weight makes" if any(inside) else "multiplies channels"
        return _apart(walk, node, left, right, reason)
    through, other = (a, b) if carried[0] else (b, a)
    batch = [
        i for i, name in enumerate(names) if name.split(".")[0] in left.labels and name.split(".")[0] in right.labels
    ]
    apart = _heads_apart(through, other, [i for i in batch if i not in summed])
    return _through(walk, node, apart, other, summed, places)


def _apart(walk: Walk, node: fx.Node, left: Operand, right: Operand, reason: str) -> Layout:
    """Nothing may act on either operand; the result has no wires."""
    for operand in (left, right):
        walk.stop(operand.layout, node, reason)
    return plain(sizes(node))


def _spread(
    left: Operand, right: Operand, out: list[str]
) -> tuple[tuple[Layout, Layout], list[str], list[list[int]]] | None:
    """Both operands over one list of atoms, the label of each atom, and the atoms of each axis of the result."""
    order = list(dict.fromkeys([*out, *left.labels, *right.labels]))
    atoms: dict[str, Axis] = {}
    operands = [left.layout, right.layout]
    for label in order:
        held = [(k, s.labels.index(label)) for k, s in enumerate((left, right)) if label in s.labels]
        forms = _forms(operands, held)
        wired = _forms(operands, [(k, axis) for k, axis in held if operands[k].has_wires_along(axis)])
        if len(wired) > 1 or (not wired and len(forms) > 1):
            for k, axis in held:
                single = operands[k].flat(axis)
                if single is None:
                    return None
                operands[k] = single
            forms = wired = _forms(operands, held)
        atoms[label] = (wired or forms or [(1,)])[0]
    names = [f"{label}.{i}" for label in order for i in range(len(atoms[label]))]
    layouts = []
    for layout, labels in zip(operands, (left.labels, right.labels), strict=True):
        layouts.append(_over(layout, labels, order, atoms))
    starts = np.cumsum([0, *(len(atoms[label]) for label in order)])
    places = [list(range(starts[order.index(label)], starts[order.index(label) + 1])) for label in out]
    return (layouts[0], layouts[1]), names, places


def _forms(operands: list[Layout], held: list[tuple[int, int]]) -> list[Axis]:
    """The ways in which an axis is made of atoms, but for one of a single entry."""
    return list(dict.fromkeys(axes for k, axis in held if not is_one(axes := operands[k].axes[axis])))


def _over(layout: Layout, labels: list[str], order: list[str], atoms: dict[str, Axis]) -> Layout:
    """The same tensor with an axis for every label, of the atoms that are wanted."""
    held = layout.permuted([labels.index(label) for label in order if label in labels])
    shape: list[int] = []
    varies: list[bool] = []
    atom_sizes: list[Dim] = []
    axis = 0
    for label in order:
        count = len(atoms[label])
        if label in labels and held.axes[axis] == atoms[label]:
            atom_sizes += held.axes[axis]
            shape += [held.ids.shape[i] for i in held.atoms(axis)]
            varies += [held.varies[i] for i in held.atoms(axis)]
        else:  # no wires along it, if it is there at all; where it differs along a part, along which is not known
            atom_sizes += [1] * count
            shape += [1] * count
            varies += [label in labels and held.varies_along(axis)] * count
        axis += label in labels
    return Layout(tuple((size,) for size in atom_sizes), held.ids.reshape(shape), tuple(varies))


def _paired(walk: Walk, node: fx.Node, a: Ids, b: Ids, summed: list[int]) -> Layout | list[Layout]:
    """Summed over channels of both: T on one is undone by T⁻ᵀ on the other."""
    a, b = np.broadcast_arrays(a, b)
    apart = [size if i not in summed else 1 for i, size in enumerate(a.shape)]
    rows = np.broadcast_to(np.arange(int(np.prod(apart))).reshape(apart), a.shape)
    event = walk.wires.event(node, "pairs two activations, channel by channel")
    walk.wires.join(a, b, (Level.PERMUTATION, Level.ORTHOGONAL))
    walk.wires.invert(a, b, event)
    walk.wires.limit((Level.LINEAR,), a, event)
    walk.wires.limit((Level.LINEAR,), b, event)
    odd = walk.wires.event(node, "pairs channels with what no weight makes")
    walk.wires.limit(EVERY, np.where(b < 0, a, -1), odd)
    walk.wires.limit(EVERY, np.where(a < 0, b, -1), odd)
    both = (Level.PERMUTATION, Level.ORTHOGONAL)
    walk.wires.together(both, a, event, rows)
    walk.wires.together(both, b, odd, rows)
    sides: tuple[tuple[Kind, Ids], ...] = (("query", a), ("key", b))
    for kind, ids in sides:
        walk.uses.append(Use(kind, node, np.moveaxis(ids, summed, range(-len(summed), 0)).ravel()))
    return plain(sizes(node))


def _heads_apart(through: Layout, other: Layout, batch: list[int]) -> Layout:
    """Heads that share their values get wires of their own, for each is mixed over tokens in another way."""
    shape = list(through.ids.shape)
    for i in batch:
        size = _wider(through.axes[i][0], other.axes[i][0])
        if shape[i] == 1 and other.varies[i] and isinstance(size, int):
            shape[i] = size
    return Layout(through.axes, np.broadcast_to(through.ids, shape), through.varies)


def _through(
    walk: Walk, node: fx.Node, through: Layout, other: Layout, summed: list[int], places: list[list[int]]
) -> Layout:
    """One operand's channels go on; the other decides what is mixed over tokens, for each of its parts on its own."""
    inner = tuple(v and size > 1 for v, size in zip(other.varies, through.ids.shape, strict=True))
    shape = [size if flag else 1 for size, flag in zip(through.ids.shape, inner, strict=True)]
    rows = np.broadcast_to(np.arange(int(np.prod(shape))).reshape(shape), through.ids.shape)
    old = through.ids
    if any(inner):
        walk.rows(through, node, "each part is mixed over tokens by weights of its own", rows)
    else:
        walk.wires.together(MIXING, old, walk.wires.event(node, "mixed over tokens"))
    ids = walk.copies(old, rows)
    for place in sorted(summed, reverse=True):
        ids = ids.squeeze(place)
    axes: list[Axis] = []
    varies: list[bool] = []
    for size, atoms in zip(sizes(node), places, strict=True):
        axes.append((size,) if len(atoms) == 1 else tuple(_wider(through.axes[i][0], other.axes[i][0]) for i in atoms))
        varies += [through.varies[i] or other.varies[i] for i in atoms]
    return Layout(tuple(axes), ids, tuple(varies))


def _wider(a: Dim, b: Dim) -> Dim:
    return b if isinstance(a, int) and a == 1 else a
