"""Spaces of whole programs: heads, scores, caches, tables, shared weights; what `ChannelSpaces` tells of them."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable

import pytest
import torch
from spaces.written import X, parsed, shown
from torch import Tensor

from qcompile.drift import drift
from qcompile.hadamard.rotation import RandomOrthogonal
from qcompile.pass_base import Report
from qcompile.spaces import Level, channel_spaces
from qcompile.spaces.apply import Edits

SCORES = """a = aten.linear.default(x, q)
            b = aten.linear.default(x, k)
            t = aten.transpose.int(b, 1, 2)
            y = aten.matmul.default(a, t)"""


def test_queries_and_keys_have_inverse_scales(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = parsed(X, "q: f64[4, 6], k: f64[4, 6]", SCORES)
    spaces = channel_spaces(program)
    (space,) = spaces[Level.DIAGONAL]
    inverse = {(p.use.kind, p.node.name): p.inverse.tolist() for p in space.placements if p.inverse is not None}
    assert inverse == {
        ("source", "a"): [[False] * 4],
        ("source", "b"): [[True] * 4],
        ("query", "y"): [[False] * 4],
        ("key", "y"): [[True] * 4],
    }
    assert shown(spaces, Level.ORTHOGONAL) == ["4: source a, source b, query y, key y"]
    assert spaces[Level.LINEAR] == []
    inputs = feeds(program)
    before = program.run(inputs)
    old = {key: program.weights[key] for key in "qk"}
    factors = torch.tensor([0.5, 3, 2, 0.25], dtype=torch.float64)
    edits = Edits(spaces, Report())
    edits.scale(space, factors)
    edits.commit()
    assert drift(program.run(inputs), before) <= 1e-13
    assert torch.equal(program.weights["q"], old["q"] * factors[:, None])
    assert torch.equal(program.weights["k"], old["k"] * (1 / factors)[:, None])


def test_keys_that_are_queries_have_no_scale() -> None:
    body = "a = aten.linear.default(x, q)\nt = aten.transpose.int(a, 1, 2)\ny = aten.matmul.default(a, t)"
    spaces = channel_spaces(parsed(X, "q: f64[4, 6]", body))
    assert spaces[Level.DIAGONAL] == []
    assert [s.width for s in spaces[Level.ORTHOGONAL]] == [4]
    use = next(u for u in spaces.uses if u.kind == "source")
    assert [str(limit) for limit in spaces.limits(Level.DIAGONAL, use.ids)] == [
        "y: pairs two activations, channel by channel"
    ]


def test_a_cache_is_a_state_of_the_space_it_holds() -> None:
    body = """v0 = aten.linear.default(x, v)
              present_0_value = aten.cat.default([past_key_values_0_value, v0], 1)
              y = aten.linear.default(present_0_value, o)"""
    inputs = f"{X}, past_key_values_0_value: f64[batch, past, 4]"
    spaces = channel_spaces(parsed(inputs, "v: f64[4, 6], o: f64[5, 4]", body, "y present_0_value"))
    (space,) = spaces[Level.ORTHOGONAL]
    assert space.of_kind("state")
    assert sorted(p.use.kind for p in space.placements) == ["sink", "source", "state"]
    alone = channel_spaces(parsed(inputs, "v: f64[4, 6], o: f64[5, 4]", body))  # the cache comes in and does not go out
    assert alone[Level.ORTHOGONAL] == []


def test_a_cache_that_goes_out_otherwise_stays() -> None:
    body = """v0 = aten.linear.default(x, v)
              c = aten.cat.default([past_key_values_0_value, v0], 1)
              present_0_value = aten.relu.default(c)
              y = aten.linear.default(c, o)"""
    inputs = f"{X}, past_key_values_0_value: f64[batch, past, 4]"
    spaces = channel_spaces(parsed(inputs, "v: f64[4, 6], o: f64[5, 4]", body, "y present_0_value"))
    assert spaces[Level.ORTHOGONAL] == []


def test_a_table_and_its_rows() -> None:
    """An embedding is a source along its features; part of a table of positions is a source of rows."""
    body = """t = aten.embedding.default(table, ids)
              p = aten.slice.Tensor(wpe, 0, 0, 3)
              z = aten.add.Tensor(t, p)
              y = aten.linear.default(z, o)"""
    spaces = channel_spaces(parsed("ids: i64[batch, 3]", "table: f64[9, 4], wpe: f64[5, 4], o: f64[2, 4]", body))
    space = next(s for s in spaces[Level.LINEAR] if s.sinks)
    (table,) = (p for p in space.sources if p.use.weight is not None and p.use.weight.name == "table")
    assert (table.use.axis, table.positions.tolist()) == (1, [[0, 1, 2, 3]])
    (wpe,) = (p for p in space.sources if p.use.weight is not None and p.use.weight.name == "wpe")
    assert wpe.use.view == (20,)
    assert wpe.positions.tolist() == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]


def test_rows_of_a_table_by_an_index() -> None:
    """All rows move alike; a row that is picked is added to tokens."""
    body = """t = aten.linear.default(x, w)
              p = aten.index.Tensor(table, [i])
              z = aten.add.Tensor(t, p)
              y = aten.linear.default(z, o)"""
    spaces = channel_spaces(parsed(f"{X}, i: i64[sequence]", "w: f64[4, 6], table: f64[3, 4], o: f64[2, 4]", body))
    (space,) = (s for s in spaces[Level.LINEAR] if s.sinks)
    assert space.width == 4
    (rows,) = (p for p in space.sources if p.use.weight is not None and p.use.weight.name == "table")
    assert rows.positions.size == 12


def test_a_weight_that_something_else_reads_stays() -> None:
    body = "h = aten.linear.default(x, w)\ny = aten.linear.default(h, o)\nz = aten.relu.default(w)"
    spaces = channel_spaces(parsed(X, "w: f64[4, 6], o: f64[5, 4]", body, "y z"))
    assert [s for level in Level for s in spaces[level] if s.sinks] == []
    use = next(u for u in spaces.uses if u.kind == "source" and u.node.name == "h")
    assert "z: reads the weight 'w' as well" in [str(limit) for limit in spaces.all_limits(Level.LINEAR, use.ids)]


def test_a_weight_that_two_products_read_moves_in_one_way() -> None:
    body = """a = aten.linear.default(x, w)
              b = aten.linear.default(z, w)
              y1 = aten.linear.default(a, o)
              y2 = aten.linear.default(b, p)"""
    inputs = f"{X}, z: f64[batch, 2, 6]"
    spaces = channel_spaces(parsed(inputs, "w: f64[4, 6], o: f64[5, 4], p: f64[3, 4]", body, "y1 y2"))
    assert shown(spaces, Level.ORTHOGONAL) == ["4: source a, source b, sink y1, sink y2"]


def test_a_quantized_weight() -> None:
    body = """h = aten.linear.default(x, w)
              d = qcompile.dequantize.default(c, s, None, "int8 sym channel", torch.float64)
              y = aten.linear.default(h, d)"""
    spaces = channel_spaces(parsed(X, "w: f64[4, 6], c: i8[5, 4], s: f64[5, 1]", body))
    assert all(not spaces[level] for level in Level)
    use = next(u for u in spaces.uses if u.kind == "source" and u.node.name == "h")
    assert [str(limit) for limit in spaces.limits(Level.LINEAR, use.ids)] == ["y: its weight is quantized already"]


@pytest.mark.parametrize(
    ("groups", "widths"),
    [(1, [8]), (2, [4, 4]), (8, [1] * 8)],
)
def test_outputs_of_a_grouped_convolution(groups: int, widths: list[int]) -> None:
    body = f"""h = aten.conv1d.default(i, w, None, [1], [0], [1], {groups})
               y = aten.conv1d.default(h, o)"""
    spaces = channel_spaces(parsed("i: f64[batch, 8, sequence]", f"w: f64[8, {8 // groups}, 3], o: f64[5, 8, 1]", body))
    found = [s.width for s in spaces[Level.LINEAR] if s.sinks and s.sources]
    assert found == (widths if groups < 8 else [])


@pytest.mark.parametrize("level", [Level.PERMUTATION, Level.DIAGONAL, Level.LINEAR])
def test_groups_of_a_convolution_share_what_they_read(level: Level, feeds: Callable[..., dict[str, Tensor]]) -> None:
    body = """h = aten.conv1d.default(i, w, b)
              y = aten.conv1d.default(h, o, None, [1], [1], [1], 2)"""
    program = parsed("i: f64[batch, 3, sequence]", "w: f64[8, 3, 1], b: f64[8], o: f64[6, 4, 3]", body)
    spaces = channel_spaces(program)
    assert shown(spaces, Level.LINEAR) == ["4: source h, source b, sink y"]
    (space,) = spaces[level]
    assert [p.positions.tolist() for p in space.sinks] == [[[0, 1, 2, 3]]]
    assert [p.positions.tolist() for p in space.sources] == [[[0, 1, 2, 3], [4, 5, 6, 7]]] * 2
    given = feeds(program)
    before, old = program.run(given), program.weights["o"]
    edits = Edits(spaces, Report())
    if level is Level.PERMUTATION:
        edits.permute(space, torch.tensor([2, 0, 3, 1]))
    elif level is Level.DIAGONAL:
        edits.scale(space, torch.tensor([0.5, 3, 2, 0.25], dtype=torch.float64))
    else:
        edits.rotate(space, RandomOrthogonal(4, 1))
    edits.commit()
    assert drift(program.run(given), before) <= 1e-13
    assert not torch.equal(program.weights["o"], old)


def test_a_stream_has_norms_or_several_ends() -> None:
    body = """a = aten.embedding.default(t, ids)
              n = aten.rms_norm.default(a, [4], None, 0.01)
              h = aten.linear.default(n, u)
              y = aten.linear.default(h, o)"""
    spaces = channel_spaces(parsed("ids: i64[batch]", "t: f64[9, 4], u: f64[6, 4], o: f64[5, 6]", body))
    stream, hidden = spaces[Level.ORTHOGONAL]
    assert (stream.is_stream, hidden.is_stream) == (True, False)
    assert [p.use.kind for p in stream.of_kind("norm", "sink")] == ["norm", "sink"]
    node = stream.sinks[0].node
    assert spaces.space(node, "sink", Level.ORTHOGONAL) is stream
    assert spaces.space(node, "source", Level.ORTHOGONAL) is hidden
    assert spaces.space(node, "query", Level.ORTHOGONAL) is None


def test_the_program_is_not_changed() -> None:
    program = parsed(X, "q: f64[4, 6], k: f64[4, 6]", SCORES)
    text = str(program)
    channel_spaces(program)
    assert str(program) == text


def test_rotating_scores_alone_is_exact(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = parsed(X, "q: f64[4, 6], k: f64[4, 6]", SCORES)
    inputs = feeds(program)
    before = program.run(inputs)
    spaces = channel_spaces(program)
    edits = Edits(spaces, Report())
    edits.rotate(spaces[Level.ORTHOGONAL][0], RandomOrthogonal(4, 0))
    edits.commit()
    assert drift(program.run(inputs), before) <= 1e-13


@pytest.mark.parametrize("read", ["a", "b"])
def test_factors_of_what_is_returned_keep_their_scales(read: str) -> None:
    body = f"""a = aten.linear.default(x, g)
               b = aten.linear.default(x, u)
               y = aten.mul.Tensor(a, b)
               z = aten.linear.default({read}, o)"""
    spaces = channel_spaces(parsed(X, "g: f64[4, 6], u: f64[4, 6], o: f64[5, 4]", body, "y z"))
    assert [space for space in spaces[Level.DIAGONAL] if space.sinks] == []


def test_a_gain_that_another_norm_reads_as_well() -> None:
    """The channels of the second norm come from an operator without a rule: no weight makes them."""
    program = parsed(
        "x: f64[batch, 6, sequence]",
        "w: f64[8, 6, 1], g: f64[8], v: f64[16, 8, 1]",
        """a = aten.conv1d.default(x, w)
            n = aten.group_norm.default(a, 1, g)
            c = aten.conv1d.default(n, v)
            s = aten.glu.default(c, 1)
            y = aten.group_norm.default(s, 1, g)""",
    )
    spaces = channel_spaces(program)
    assert "g" not in {p.node.name for s in spaces[Level.PERMUTATION] for p in s.placements}


MERGED = {
    "by elements": (
        "g: f64[2, 3, 4]",
        "v: f64[8, 6], o: f64[5, 8]",
        """a = aten.linear.default(x, v)
        halves = aten.view.default(a, [2, 3, 2, 4])
        turned = aten.transpose.int(halves, 1, 2)
        back = aten.transpose.int(turned, 1, 2)
        b = aten.reshape.default(back, [2, 3, 8])
        one = aten.unsqueeze.default(g, -1)
        two = aten.expand.default(one, [-1, -1, -1, 2])
        quarters = aten.reshape.default(two, [2, 3, 8])
        c = aten.mul.Tensor(b, quarters)
        y = aten.linear.default(c, o)""",
    ),
    "over tokens": (
        "g: f64[2, 4, 3, 3]",
        "v: f64[16, 6], o: f64[5, 16]",
        """a = aten.linear.default(x, v)
        heads = aten.view.default(a, [2, 3, 2, 4, 2])
        turned = aten.permute.default(heads, [0, 2, 3, 1, 4])
        b = aten.reshape.default(turned, [16, 3, 2])
        one = aten.unsqueeze.default(g, 2)
        two = aten.expand.default(one, [-1, -1, 2, -1, -1])
        pairs = aten.reshape.default(two, [16, 3, 3])
        c = aten.bmm.default(pairs, b)
        d = aten.view.default(c, [2, 8, 3, 2])
        e = aten.transpose.int(d, 1, 2)
        f = aten.reshape.default(e, [2, 3, 16])
        y = aten.linear.default(f, o)""",
    ),
}


@pytest.mark.parametrize("case", MERGED)
def test_a_factor_that_cuts_an_axis_elsewhere_parts_the_vectors(
    case: str, feeds: Callable[..., dict[str, Tensor]]
) -> None:
    given, weights, body = MERGED[case]
    program = parsed(f"x: f64[2, 3, 6], {given}", weights, body)
    spaces = channel_spaces(program)
    assert {space.width for space in spaces[Level.ORTHOGONAL]} <= {2}
    inputs = feeds(program)
    before = program.run(inputs)
    edits = Edits(spaces, Report())
    for space in spaces[Level.ORTHOGONAL]:
        edits.rotate(space, RandomOrthogonal(space.width, 3))
    edits.commit()
    assert drift(program.run(inputs), before) <= 1e-13


def test_an_analysis_is_let_go_with_its_program() -> None:
    program = parsed(X, "q: f64[4, 6], k: f64[4, 6]", SCORES)
    spaces = channel_spaces(program)
    assert spaces[Level.ORTHOGONAL]
    assert spaces[Level.ORTHOGONAL] is spaces[Level.ORTHOGONAL]  # found once
    assert spaces.limits(Level.LINEAR, spaces.uses[0].ids)
    held = weakref.ref(program), weakref.ref(spaces)
    del program, spaces
    gc.collect()
    assert [reference() for reference in held] == [None, None]
