"""Which channels are of one vector: heads, tokens side by side, copies; only those are mixed with each other."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from spaces.written import X, parsed
from torch import Tensor

from qcompile.drift import drift
from qcompile.hadamard.rotation import RandomOrthogonal
from qcompile.pass_base import Report
from qcompile.spaces import Level, channel_spaces
from qcompile.spaces.apply import Edits

HEADS = """v0 = aten.linear.default(x, v)
           v1 = aten.unflatten.int(v0, -1, [2, 4])
           v2 = aten.transpose.int(v1, 1, 2)
           a = aten.scaled_dot_product_attention.default(q, k, v2, enable_gqa=True)
           a1 = aten.transpose.int(a, 1, 2)
           a2 = aten.flatten.using_ints(a1, 2, 3)
           y = aten.linear.default(a2, o)"""


def test_values_head_by_head() -> None:
    """Two heads of values, each read by two heads of queries: two copies in the columns of o."""
    inputs = f"{X}, q: f64[batch, 4, sequence, 3], k: f64[batch, 2, sequence, 3]"
    spaces = channel_spaces(parsed(inputs, "v: f64[8, 6], o: f64[5, 16]", HEADS))
    for level in (Level.PERMUTATION, Level.ORTHOGONAL, Level.LINEAR):
        first, second = spaces[level]
        assert first.sources[0].positions.tolist() == [[0, 1, 2, 3]]
        assert second.sources[0].positions.tolist() == [[4, 5, 6, 7]]
        assert sorted(first.sinks[0].positions.tolist()) == [[0, 1, 2, 3], [4, 5, 6, 7]]
        assert sorted(second.sinks[0].positions.tolist()) == [[8, 9, 10, 11], [12, 13, 14, 15]]
        assert first.name == second.name == "v … o"
    assert sum(s.width for s in spaces[Level.DIAGONAL]) == 8


def test_channels_from_two_positions_are_not_one_vector() -> None:
    body = """h = aten.linear.default(x, w)
              q = aten.constant_pad_nd.default(h, [0, 0, 1, -1])
              u = aten.slice.Tensor(h, -1, 0, 4)
              v = aten.slice.Tensor(q, -1, 4, 8)
              r = aten.cat.default([u, v], -1)
              y = aten.linear.default(r, o)"""
    spaces = channel_spaces(parsed(X, "w: f64[8, 6], o: f64[5, 8]", body))
    for level in (Level.ORTHOGONAL, Level.LINEAR):
        assert [s.sources[0].positions.tolist() for s in spaces[level]] == [[[0, 1, 2, 3]], [[4, 5, 6, 7]]]


@pytest.mark.parametrize("order", ["a, d, c, b, f, e", "f, d, c, b, a, e"])
def test_copies_that_stand_in_another_order_each_time(order: str, feeds: Callable[..., dict[str, Tensor]]) -> None:
    """Channels 0, 2, 5 move alike, and 1, 3, 4; a product reads them in other pairs than the one that makes them."""
    slices = "\n".join(f"{n} = aten.slice.Tensor(h, 1, {i}, {i + 1})" for i, n in enumerate("abcdef"))
    program = parsed(
        "x: f64[batch, 6]",
        "w: f64[6, 6], o: f64[5, 2], p: f64[3, 6]",
        f"""h = aten.linear.default(x, w)
        {slices}
        u = aten.cat.default([a, d], 1)
        v = aten.cat.default([c, b], 1)
        r = aten.cat.default([f, e], 1)
        s0 = aten.add.Tensor(u, v)
        s = aten.add.Tensor(s0, r)
        y = aten.linear.default(s, o)
        t = aten.cat.default([{order}], 1)
        z = aten.linear.default(t, p)""",
        "y z",
    )
    given = feeds(program)
    before = program.run(given)
    spaces = channel_spaces(program)
    edits = Edits(spaces, Report())
    for space in spaces[Level.ORTHOGONAL]:
        edits.rotate(space, RandomOrthogonal(space.width, 1))
    edits.commit()
    assert drift(program.run(given), before) <= 1e-12


def test_one_gate_for_a_head_lets_rotations_pass() -> None:
    body = """v0 = aten.linear.default(x, v)
              v1 = aten.unflatten.int(v0, -1, [2, 4])
              g0 = aten.linear.default(x, g)
              g1 = aten.unsqueeze.default(g0, -1)
              m = aten.mul.Tensor(v1, g1)
              m1 = aten.flatten.using_ints(m, 2, 3)
              y = aten.linear.default(m1, o)"""
    spaces = channel_spaces(parsed(X, "v: f64[8, 6], g: f64[2, 6], o: f64[5, 8]", body))
    assert [space.width for space in spaces[Level.ORTHOGONAL]] == [4, 4]


def test_tokens_of_two_products_that_are_joined_move_alike() -> None:
    body = """a = aten.linear.default(x, v)
              b = aten.linear.default(x, w)
              c = aten.cat.default([a, b], 1)
              y = aten.linear.default(c, o)"""
    spaces = channel_spaces(parsed(X, "v: f64[4, 6], w: f64[4, 6], o: f64[5, 4]", body))
    for level in Level:
        assert sum(space.width for space in spaces[level]) == 4
        assert all([p.node.name for p in space.sources] == ["a", "b"] for space in spaces[level])


def test_parts_of_two_tokens_side_by_side_are_not_mixed(feeds: Callable[..., dict[str, Tensor]]) -> None:
    """Half a token beside half of the next one: a rotation acts on the halves that belong together."""
    halves = "\n".join(
        f"{n}{i} = aten.slice.Tensor({n}, 2, {2 * i}, {2 * i + 2})" for n in ("p", "q") for i in range(2)
    )
    program = parsed(
        "x: f64[batch, 5, 6]",
        "w: f64[4, 6], o: f64[3, 8]",
        f"""h = aten.linear.default(x, w)
        p = aten.slice.Tensor(h, 1, 0, 4)
        q = aten.slice.Tensor(h, 1, 1, 5)
        {halves}
        t = aten.cat.default([p0, q1, q0, p1], 2)
        y = aten.linear.default(t, o)""",
    )
    given = feeds(program)
    before = program.run(given)
    spaces = channel_spaces(program)
    edits = Edits(spaces, Report())
    (space,) = spaces[Level.ORTHOGONAL]
    assert space.sinks[0].positions.tolist() == [[0, 1, 6, 7], [4, 5, 2, 3]]
    edits.rotate(space, RandomOrthogonal(4, 1))
    edits.commit()
    assert drift(program.run(given), before) <= 1e-12


@pytest.mark.parametrize(
    ("op", "linear"),
    [
        ("aten.relu.default(p)", 1),
        ("aten.gelu.default(p)", 1),
        ("aten.neg.default(p)", 2),
        ("aten.mul.Tensor(p, 3.0)", 2),
        ("aten.add.Tensor(p, 3.0)", 1),
    ],
)
def test_what_changes_half_of_a_vector_parts_it_from_the_other(
    op: str, linear: int, feeds: Callable[..., dict[str, Tensor]]
) -> None:
    program = parsed(
        "x: f64[batch, sequence, 6]",
        "w: f64[8, 6], v: f64[6, 8]",
        f"""h = aten.linear.default(x, w)
            p = aten.slice.Tensor(h, -1, 0, 4)
            q = aten.slice.Tensor(h, -1, 4, 8)
            r = {op}
            c = aten.cat.default([r, q], -1)
            y = aten.linear.default(c, v)""",
    )
    spaces = channel_spaces(program)
    assert [s.width for s in spaces[Level.PERMUTATION]] == [4, 4]
    assert [s.width for s in spaces[Level.ORTHOGONAL]] == [4] * linear
    inputs = feeds(program)
    before = program.run(inputs)
    edits = Edits(spaces, Report())
    for space in spaces[Level.PERMUTATION]:
        edits.permute(space, torch.tensor([2, 0, 3, 1]))
    edits.commit()
    assert drift(program.run(inputs), before) <= 1e-13


SHARED = """h = aten.view.default(x, [2, 5, 2, 6])
           a = aten.einsum.default("bshi,hoi->bsho", [h, w])
           m = aten.reshape.default(a, [2, 5, 8])"""


@pytest.mark.parametrize(
    "cut",
    [
        "p = aten.slice.Tensor(m, 2, 3, 8); q = aten.slice.Tensor(m, 2, 0, 3); r = aten.cat.default([p, q], 2)",
        "l = aten.split_with_sizes.default(m, [3, 5], 2); p = operator.getitem(l, 0); q = operator.getitem(l, 1)"
        "; r = aten.cat.default([q, p], 2)",
        "r = aten.roll.default(m, [3], [2])",
    ],
)
def test_heads_that_share_a_space_are_known_apart_where_their_axis_is_cut(
    cut: str, feeds: Callable[..., dict[str, Tensor]]
) -> None:
    """Behind a roll by 3, half of what reads the first head is of the second one."""
    cut = "\n".join(cut.split("; "))
    body = f"""{SHARED}
               {cut}
               v = aten.view.default(r, [2, 5, 2, 4])
               y = aten.linear.default(v, o)"""
    program = parsed("x: f64[2, 5, 12]", "w: f64[2, 4, 6], o: f64[3, 4]", body)
    spaces = channel_spaces(program)
    (space,) = spaces[Level.PERMUTATION]
    assert space.width == 3  # of four: the other one is of another head than they, each time
    inputs = feeds(program)
    before = program.run(inputs)
    edits = Edits(spaces, Report())
    edits.permute(space, torch.tensor([2, 0, 1]))
    edits.commit()
    assert drift(program.run(inputs), before) <= 1e-13


def test_heads_that_share_a_space_are_copies_of_it_where_one_weight_reads_them(
    feeds: Callable[..., dict[str, Tensor]],
) -> None:
    program = parsed("x: f64[2, 5, 12]", "w: f64[2, 4, 6], o: f64[3, 8]", f"{SHARED}\ny = aten.linear.default(m, o)")
    spaces = channel_spaces(program)
    (space,) = spaces[Level.LINEAR]
    assert space.sinks[0].positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7]]
    inputs = feeds(program)
    before = program.run(inputs)
    edits = Edits(spaces, Report())
    edits.rotate(space, RandomOrthogonal(4, 1))
    edits.commit()
    assert drift(program.run(inputs), before) <= 1e-12
