"""Layouts through views, and the forests and signatures of wires."""

from __future__ import annotations

import numpy as np
import pytest
import sympy

from qcompile.ir.program import Program
from qcompile.ir.types import Dim
from qcompile.spaces.forest import Forest
from qcompile.spaces.layout import Layout, along, plain, product, same, viewed
from qcompile.spaces.space import Groups, placements
from qcompile.spaces.walk import Use
from qcompile.spaces.wires import Level, Wires

B, S = sympy.symbols("batch sequence", integer=True, positive=True)

NODE = Program.parse("def main(x: f64[2]):\n    y = aten.neg.default(x)\n    return {'y': y}").output_node


def wired(shape: list[Dim], axis: int) -> Layout:
    """Wires 0, 1, … along one axis."""
    return along(shape, axis, np.arange(int(shape[axis])))


def view(layout: Layout, shape: list[Dim]) -> Layout:
    found = viewed(layout, shape)
    assert found is not None
    assert [product(axis) for axis in found.axes] == shape
    assert found.ids.ndim == sum(len(a) for a in found.axes) == len(found.varies)
    return found


def test_heads_are_split_and_merged() -> None:
    split = view(wired([B, S, 12], 2), [B, S, 3, 4])
    assert split.ids.shape == (1, 1, 3, 4)
    assert np.array_equal(split.ids.ravel(), np.arange(12))
    assert split.varies == (True, True, True, True)
    moved = split.permuted([0, 2, 1, 3])
    back = moved.permuted([0, 2, 1, 3])
    merged = view(back, [B, S, 12])
    assert np.array_equal(merged.all_flat().ids.ravel(), np.arange(12))  # type: ignore[union-attr]


def test_batch_times_heads_is_taken_apart_again() -> None:
    heads = wired([B, 3, S, 4], 1)
    merged = view(heads, [3 * B, S, 4])
    assert merged.axes == ((B, 3), (S,), (4,))
    again = view(merged, [B, 3, S, 4])
    assert np.array_equal(again.ids, heads.ids)
    assert again.axes == heads.axes


def test_tokens_are_flattened_around_channels() -> None:
    flat = view(wired([B, S, 8], 2), [B * S, 8])
    assert flat.ids.shape == (1, 1, 8)
    again = view(flat, [B, S, 2, 4])
    assert again.ids.shape == (1, 1, 2, 4)


def test_axes_of_one() -> None:
    wide = view(wired([B, 8], 1), [B, 1, 8, 1])
    assert wide.ids.shape == (1, 1, 8, 1)
    assert wide.varies == (True, False, True, False)
    assert view(wide, [B, 8]).ids.shape == (1, 8)


@pytest.mark.parametrize(
    ("layout", "shape"),
    [
        (wired([B, S, 8], 2), [B, 8, S]),
        (wired([B, S, 8], 2), [2 * B, S, 4]),
        (wired([B, 8, S], 1), [B, 4, 2 * S]),
        (wired([B, S, 6], 2), [B, 2 * S, 3]),
    ],
    ids=["another order", "batch and channels", "channels then tokens", "tokens and channels"],
)
def test_cuts_across_channels_and_tokens(layout: Layout, shape: list[Dim]) -> None:
    assert viewed(layout, shape) is None


def test_what_has_no_wires_may_be_cut_anywhere() -> None:
    assert view(plain([B, S, 8]), [B, 8, S]).has_wires is False
    assert view(plain([4, 6]), [6, 4]).varies == (True, True)


def test_fixed_sizes_may_be_cut_across() -> None:
    ids = view(wired([4, 6], 1), [8, 3]).ids
    assert np.array_equal(ids, np.broadcast_to(np.arange(6), (4, 6)).reshape(8, 3))


def test_entries_of_an_axis() -> None:
    layout = wired([B, 8], 1)
    assert np.array_equal(layout.taken(1, np.arange(8)[1::3]).ids.ravel(), [1, 4, 7])  # type: ignore[union-attr]
    merged = view(wired([B, 4, S], 1), [4 * B, S])
    assert layout.taken(1, np.arange(8)[1::3]).varies == (True, True)  # type: ignore[union-attr]
    assert layout.taken(1, np.array([5])).varies == (True, False)  # type: ignore[union-attr]
    assert merged.taken(0, np.arange(4)) is None
    assert layout.flat(1) is layout
    assert merged.flat(0) is None
    assert merged.all_flat() is None


def test_axes_come_and_go() -> None:
    layout = wired([B, 8], 1).inserted(1, 3)
    assert layout.axes == ((B,), (3,), (8,))
    assert layout.varies == (True, False, True)
    assert not layout.has_wires_along(1)
    assert layout.has_wires_along(2)
    gone = layout.sized(1, 1).without(1)
    assert gone.axes == ((B,), (8,))
    assert gone.without_single(0).axes == ((8,),)


def test_sizes() -> None:
    assert same(B * S, S * B)
    assert not same(B, S)
    assert product([2, 3]) == 6
    assert isinstance(product([2, 3]), int)
    assert product([B, 0]) == 0


def test_trees_are_joined() -> None:
    forest = Forest()
    forest.grow(8)
    forest.join(np.array([0, 2, 4]), np.array([1, 3, 5]))
    forest.join(np.array([1, 5]), np.array([2, 6]))
    roots = forest.find(np.arange(8))
    assert roots.tolist() == [0, 0, 0, 0, 4, 4, 4, 7]


def test_many_trees_are_joined_at_once() -> None:
    forest = Forest()
    forest.grow(200)
    generator = np.random.default_rng(0)
    a, b = generator.integers(0, 200, (2, 150))
    forest.join(a, b)
    classes = list(range(200))
    for x, y in zip(a, b, strict=True):
        old, new = classes[y], classes[x]
        classes = [new if c == old else c for c in classes]
    roots = forest.find(np.arange(200))
    slow = np.array(classes)
    assert np.array_equal(roots[:, None] == roots, slow[:, None] == slow)


def test_signs_along_a_chain() -> None:
    forest = Forest(signed=True)
    forest.grow(6)
    assert forest.join(np.array([0, 1]), np.array([1, 2]), inverse=True).size == 0
    assert forest.join(np.array([3]), np.array([2])).size == 0
    roots, sign = forest.find_signed(np.arange(6))
    assert sign is not None
    assert roots[:4].tolist() == [0, 0, 0, 0]
    assert sign[:4].tolist() == [1, -1, 1, 1]
    assert sign[4:].tolist() == [1, 1]


@pytest.mark.parametrize("inverse", [True, False])
def test_a_wire_that_is_its_own_inverse(inverse: bool) -> None:
    forest = Forest(signed=True)
    forest.grow(4)
    forest.join(np.array([0]), np.array([1]), inverse=not inverse)
    assert forest.join(np.array([1]), np.array([0]), inverse=inverse).tolist() == [0]
    assert forest.join(np.array([2]), np.array([2]), inverse=True).tolist() == [2]


def test_inverse_scales_in_a_circle_are_pinned() -> None:
    wires = Wires(NODE)
    ids = wires.fresh(np.zeros(3, np.int64))
    wires.events += [None] * 2  # type: ignore[list-item]
    wires.invert(ids[:1], ids[1:2], 0)
    assert wires.limited(Level.DIAGONAL).tolist() == [-1, -1, -1]
    wires.invert(ids[1:2], ids[:1], 0)
    assert wires.limited(Level.DIAGONAL).tolist() == [-1, -1, -1]
    wires.invert(ids[1:2], ids[2:3], 0)
    wires.invert(ids[:1], ids[2:3], 1)
    assert wires.limited(Level.DIAGONAL).tolist() == [1, 1, 1]


def test_signatures() -> None:
    """Wires that occur together, everywhere and in the same rows, share one."""
    wires = Wires(NODE)
    ids = wires.fresh(np.zeros(6, np.int64))
    wires.together((Level.ORTHOGONAL,), ids, 0)
    assert len(set(wires.signatures(Level.ORTHOGONAL).tolist())) == 1
    wires.together((Level.ORTHOGONAL,), ids, 1, np.array([0, 0, 0, 1, 1, 1]))
    found = wires.signatures(Level.ORTHOGONAL)
    assert len(set(found[:3].tolist())) == len(set(found[3:].tolist())) == 1
    assert found[0] != found[3]
    assert len(set(wires.signatures(Level.LINEAR).tolist())) == 1


def test_wires_of_two_vectors_are_not_mixed() -> None:
    wires = Wires(NODE)
    ids = wires.fresh(np.array([[0], [1]]).repeat(3, 1))
    wires.together((Level.ORTHOGONAL, Level.PERMUTATION), ids, 0)
    for level in (Level.ORTHOGONAL, Level.PERMUTATION):
        found = wires.signatures(level)
        assert found[0] == found[2] != found[3] == found[5]


def test_wires_that_are_joined_share_their_limits() -> None:
    wires = Wires(NODE)
    first, second = wires.fresh(np.zeros(2, np.int64)), wires.fresh(np.zeros(2, np.int64))
    wires.join(first, second, (Level.DIAGONAL,))
    wires.events += [None] * 2  # type: ignore[list-item]
    wires.limit((Level.DIAGONAL,), second[:1], 1)
    wires.join(np.array([-1, 1]), np.array([0, -1]))
    assert wires.limited(Level.DIAGONAL).tolist() == [1, -1, 1, -1]
    assert wires.limited(Level.PERMUTATION).tolist() == [-1] * 4


@pytest.mark.parametrize("first", [1, 3], ids=["the first half has the smaller number", "the larger"])
@pytest.mark.parametrize("order", [[0, 1, 2, 3], [0, 2, 1, 3]], ids=["in order", "in another order"])
def test_halves_of_two_vectors_are_no_copy(first: int, order: list[int]) -> None:
    forest = Forest.of(4, [])
    groups = Groups.of(np.arange(4), np.zeros(4, np.uint64), 2, 4)
    use = Use("source", NODE, np.array(order))
    halves, one = np.array([first, first, 2, 2], np.uint64), np.full(4, 2, np.uint64)
    assert list(placements(use, groups, forest, halves.__getitem__)) == [(0, None)]
    ((number, whole),) = placements(use, groups, forest, one.__getitem__)
    assert number == 0
    assert whole is not None
    assert whole.positions.tolist() == [np.argsort(order).tolist()]


def test_what_varies_moves_with_its_axis() -> None:
    assert plain([B, 1, 5]).permuted([1, 0, 2]).varies == (False, True, True)


def test_a_merged_axis_has_wires_where_a_part_has() -> None:
    merged = view(wired([2, 3], 1), [6])
    assert merged.ids.shape == (1, 3)
    assert merged.has_wires_along(0)
