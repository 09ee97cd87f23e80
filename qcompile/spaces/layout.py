"""`Layout`: which wire stands where in a tensor, and how that moves through views.

Each axis of a tensor is a product of *atoms*: an axis that a view merged from ``[batch, heads]`` keeps both, so that
the next view can take it apart again. Along an atom, wires either vary or do not (tokens, the batch). A tensor without
wires, such as a mask, has a layout too: where it varies is where it treats elements of others differently.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import sympy

from qcompile.ir.types import Dim
from qcompile.spaces.forest import Ids

Axis = tuple[Dim, ...]
Spread: TypeAlias = Callable[[Ids, Ids], Ids]
"""Wires of their own for several vectors that stand side by side: those of one, as often, and the number of each."""


@dataclass(frozen=True, eq=False)
class Layout:
    """Wires of one tensor.

    `axes` has the atoms of each axis of the tensor. `ids` has one axis an atom, of length 1 where wires do not vary
    along it; -1 is no wire. `varies` says, for each atom, whether anything of the value differs along it.
    """

    axes: tuple[Axis, ...]
    ids: Ids
    varies: tuple[bool, ...]
    zero: bool = False  # the value is 0 everywhere

    @property
    def has_wires(self) -> bool:
        """Whether any element is on a wire."""
        return bool((self.ids >= 0).any())

    @property
    def rank(self) -> int:
        """Number of axes of the tensor."""
        return len(self.axes)

    def atoms(self, axis: int) -> range:
        """The axes of `ids` that one axis of the tensor is made of."""
        start = sum(len(a) for a in self.axes[:axis])
        return range(start, start + len(self.axes[axis]))

    def has_wires_along(self, axis: int) -> bool:
        """Whether wires differ along an axis of the tensor."""
        return any(self.ids.shape[i] > 1 for i in self.atoms(axis))

    def varies_along(self, axis: int) -> bool:
        """Whether anything differs along an axis of the tensor."""
        return any(self.varies[i] for i in self.atoms(axis))

    def flat(self, axis: int, spread: Spread | None = None) -> Layout | None:
        """The same with one atom for `axis`; None where wires vary along a part of it that has no fixed size.

        Where the axis holds the vectors of several tokens, one behind the other, `spread` gives each its wires: what
        cuts such an axis must know them apart. Without it they are on the same wires.
        """
        atoms = self.atoms(axis)
        if len(atoms) == 1:
            return self
        sizes = self.axes[axis]
        varies = any(self.varies[i] for i in atoms)
        ids = self.ids
        if any(ids.shape[i] > 1 for i in atoms):
            if not all(isinstance(s, int) for s in sizes):
                return None
            shape = list(ids.shape)
            shape[atoms.start : atoms.stop] = [int(s) for s in sizes]
            ids = _wide(ids, shape, self.varies, spread)
            width = int(np.prod(shape[atoms.start : atoms.stop]))
        else:
            width = 1
        ids = ids.reshape([*ids.shape[: atoms.start], width, *ids.shape[atoms.stop :]])
        axes = (*self.axes[:axis], (product(sizes),), *self.axes[axis + 1 :])
        return Layout(axes, ids, (*self.varies[: atoms.start], varies, *self.varies[atoms.stop :]), self.zero)

    def all_flat(self, spread: Spread | None = None) -> Layout | None:
        """The same with one atom for every axis."""
        result: Layout | None = self
        for axis in range(self.rank):
            result = result.flat(axis, spread) if result is not None else None
        return result

    def permuted(self, order: Sequence[int]) -> Layout:
        """Axes of the tensor in another order."""
        places = [i for axis in order for i in self.atoms(axis)]
        return Layout(
            tuple(self.axes[axis] for axis in order),
            self.ids.transpose(places),
            tuple(self.varies[i] for i in places),
            self.zero,
        )

    def inserted(self, axis: int, size: Dim = 1) -> Layout:
        """A new axis, along which nothing differs, before `axis`."""
        place = sum(len(a) for a in self.axes[:axis])
        return Layout(
            (*self.axes[:axis], (size,), *self.axes[axis:]),
            np.expand_dims(self.ids, place),
            (*self.varies[:place], False, *self.varies[place:]),
            self.zero,
        )

    def taken(self, axis: int, index: Any, spread: Spread | None = None) -> Layout | None:
        """Entries of one axis: those of `index`, an array; wires that do not vary along it stay."""
        flat = self.flat(axis, spread)
        if flat is None:
            return None
        (place,) = flat.atoms(axis)
        ids = flat.ids if flat.ids.shape[place] == 1 else np.take(flat.ids, index, place)
        axes = (*flat.axes[:axis], (len(index),), *flat.axes[axis + 1 :])
        varies = (*flat.varies[:place], flat.varies[place] and len(index) > 1, *flat.varies[place + 1 :])
        return Layout(axes, ids, varies, self.zero)

    def sized(self, axis: int, size: Dim) -> Layout:
        """Another size for an axis along which no wires differ."""
        atoms = self.atoms(axis)
        assert all(self.ids.shape[i] == 1 for i in atoms)
        ids = self.ids.reshape([*self.ids.shape[: atoms.start], 1, *self.ids.shape[atoms.stop :]])
        varies = any(self.varies[i] for i in atoms)
        axes = (*self.axes[:axis], (size,), *self.axes[axis + 1 :])
        return Layout(axes, ids, (*self.varies[: atoms.start], varies, *self.varies[atoms.stop :]), self.zero)

    def expanded(self, shape: Sequence[Dim]) -> Layout:
        """Copies along new axes in front, and along axes of another size, so that the tensor has `shape`."""
        layout = self
        while layout.rank < len(shape):
            layout = layout.inserted(0)
        for axis, size in enumerate(shape):
            if not same(product(layout.axes[axis]), size):
                layout = layout.sized(axis, size)
        return layout

    def without(self, axis: int) -> Layout:
        """An axis along which no wires differ, gone."""
        atoms = self.atoms(axis)
        ids = self.ids.reshape([*self.ids.shape[: atoms.start], *self.ids.shape[atoms.stop :]])
        axes = (*self.axes[:axis], *self.axes[axis + 1 :])
        return Layout(axes, ids, (*self.varies[: atoms.start], *self.varies[atoms.stop :]), self.zero)

    def without_single(self, axis: int) -> Layout:
        """An axis of one entry, gone; its wire stays with the rest."""
        (place,) = self.atoms(axis)
        axes = (*self.axes[:axis], *self.axes[axis + 1 :])
        return Layout(axes, self.ids.squeeze(place), (*self.varies[:place], *self.varies[place + 1 :]))

    def with_ids(self, ids: Ids) -> Layout:
        """Other wires in the same places."""
        return Layout(self.axes, ids, self.varies)


def plain(shape: Sequence[Dim], varies: bool = True, zero: bool = False) -> Layout:
    """A tensor without wires."""
    axes = tuple((s,) for s in shape)
    ids = np.full([1] * len(axes), -1, np.int64)
    return Layout(axes, ids, tuple(varies and s != 1 for s in shape), zero)


def along(shape: Sequence[Dim], axis: int, ids: Ids) -> Layout:
    """A tensor whose wires differ along one axis only."""
    axes = tuple((s,) for s in shape)
    form = [1] * len(axes)
    form[axis] = ids.size
    return Layout(axes, ids.reshape(form), tuple(s != 1 for s in shape))


def product(sizes: Sequence[Dim]) -> Dim:
    """The number of elements, an int where it can be one."""
    total = sympy.expand(sympy.prod([sympy.sympify(s) for s in sizes]))
    return int(total) if total.is_number else total


def same(a: Dim, b: Dim) -> bool:
    """Whether two sizes are equal for all values of their symbols."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(sympy.expand(sympy.sympify(a) - sympy.sympify(b)) == 0)


def _wide(ids: Ids, shape: list[int], varies: Sequence[bool], spread: Spread | None) -> Ids:
    """Wires in a larger shape; what differs along an axis on which wires do not is spread."""
    wide = np.broadcast_to(ids, shape)
    apart = [size if v and old == 1 else 1 for v, old, size in zip(varies, ids.shape, shape, strict=True)]
    count = int(np.prod(apart))
    if spread is None or count == 1:
        return wide
    return spread(wide, np.broadcast_to(np.arange(count).reshape(apart), shape))


def viewed(layout: Layout, shape: Sequence[Dim], spread: Spread | None = None) -> Layout | None:
    """The same elements in the same order in another shape; None where wires would end up at no fixed place.

    Where the new axes cut across the vectors of several tokens, `spread` gives each its wires.
    """
    atoms = [(size, i) for i, size in enumerate(a for axis in layout.axes for a in axis)]
    pieces = _cut([(s, layout.ids.shape[i] > 1, layout.varies[i]) for s, i in atoms], list(shape))
    if pieces is None:
        return None
    ids = layout.ids
    new_axes: list[Axis] = []
    form: list[int] = []
    varies: list[bool] = []
    for run in pieces:
        recut = _recut(ids, len(form), run, spread)
        if recut is None:
            return None
        ids, sizes, wires, flags = recut
        form += wires
        varies += flags
        new_axes += sizes
    return Layout(tuple(new_axes), ids.reshape(form), tuple(varies), layout.zero)


@dataclass(frozen=True)
class _Run:
    """Atoms and the axes of the new shape that have as many elements."""

    atoms: list[tuple[Dim, bool, bool]]  # size, whether wires vary, whether anything varies
    axes: list[Dim]


def _cut(atoms: list[tuple[Dim, bool, bool]], shape: list[Dim]) -> list[_Run] | None:
    """Shortest runs of atoms and of new axes with equal products."""
    runs: list[_Run] = []
    i = j = 0
    while i < len(atoms) or j < len(shape):
        run = _Run([], [])
        left: Any = sympy.Integer(1)
        right: Any = sympy.Integer(1)
        while True:
            if (run.atoms or run.axes) and same(left, right):
                break
            take_atom = i < len(atoms) and (j >= len(shape) or not run.atoms or (bool(run.axes) and _less(left, right)))
            if take_atom:
                left, i = sympy.expand(left * atoms[i][0]), i + 1
                run.atoms.append(atoms[i - 1])
            elif j < len(shape):
                right, j = sympy.expand(right * shape[j]), j + 1
                run.axes.append(shape[j - 1])
            else:
                return None
        runs.append(run)
    return runs


def _less(left: Any, right: Any) -> bool:
    if left.is_number and right.is_number:
        return bool(left < right)
    return bool(sympy.fraction(sympy.cancel(right / left))[1] == 1)


def _recut(
    ids: Ids, done: int, run: _Run, spread: Spread | None
) -> tuple[Ids, list[Axis], list[int], list[bool]] | None:
    """Take one run apart: `ids` has its axes from `done` on; those before are recut already."""
    width = len(run.atoms)
    head, tail = list(ids.shape[:done]), list(ids.shape[done + width :])
    if len(run.axes) == 1:  # merged, or left as it is: keep the atoms
        kept = [k for k, (s, wired, _) in enumerate(run.atoms) if s != 1 or wired] or list(range(min(1, width)))
        sizes: Axis = tuple(run.atoms[k][0] for k in kept) or (1,)
        wires = [ids.shape[done + k] for k in kept] or [1]
        flags = [run.atoms[k][2] for k in kept] or [False]
        return ids.reshape([*head, *wires, *tail]), [sizes], wires, flags
    varies = any(v for _, _, v in run.atoms)
    if not any(wired for _, wired, _ in run.atoms):
        wires = [1] * len(run.axes)
        return (
            ids.reshape([*head, *wires, *tail]),
            [(s,) for s in run.axes],
            wires,
            [varies and s != 1 for s in run.axes],
        )
    if not all(isinstance(s, int) for s, _, _ in run.atoms):
        return None
    flags = [v for _, _, v in run.atoms]
    shape = [*head, *(int(s) for s, _, _ in run.atoms), *tail]
    ids = _wide(ids, shape, [False] * len(head) + flags + [False] * len(tail), spread)
    wires = [int(s) for s in run.axes]
    return ids.reshape([*head, *wires, *tail]), [(s,) for s in run.axes], wires, [s != 1 for s in run.axes]
