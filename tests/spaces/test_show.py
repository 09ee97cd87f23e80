"""Descriptions, the table and the picture of channel spaces."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from functools import cache

import pytest

import qcompile as qc
from qcompile import zoo
from qcompile.ir.program import Program
from qcompile.pass_base import parse_pass
from qcompile.spaces import ChannelSpaces, Level, channel_spaces
from qcompile.spaces.show import Description, describe, grouped
from qcompile.spaces.show.graph import drawing
from qcompile.spaces.show.names import braced, merged, plain, ranges, template
from qcompile.spaces.show.picture import draw
from qcompile.spaces.show.place import placed
from qcompile.spaces.show.reasons import LIFTS, SPLITS
from qcompile.spaces.show.table import as_data, limits, may_act, table

BLOCK = """\
def main(x: f32[batch, 8], *, w: f32[8, 8] = "a.0.weight", g: f32[8] = "b.0.weight", up: f32[12, 8] = "c.0.up.weight", down: f32[8, 12] = "c.0.down.weight"):
    y: f32[batch, 8] = aten.linear.default(x, w)  # a.0
    n: f32[batch, 8] = aten.rms_norm.default(y, [8], g, 1e-05)  # b.0
    u: f32[batch, 12] = aten.linear.default(n, up)  # c.0.up
    r: f32[batch, 12] = aten.relu.default(u)  # c.0
    d: f32[batch, 8] = aten.linear.default(r, down)  # c.0.down
    return {"d": d}"""


@cache
def _zoo(name: str, passes: str) -> ChannelSpaces:
    program = qc.capture(zoo.path(name))  # type: ignore[arg-type]
    qc.run_passes(program, passes)
    return channel_spaces(program)


def _of_kind(found: list[Description], kind: str) -> list[Description]:
    return [d for d in found if d.kind == kind]


def test_a_block() -> None:
    found = describe(channel_spaces(Program.parse(BLOCK)))
    assert [(d.kind, d.width, d.levels) for d in found] == [
        ("hidden", 8, (Level.PERMUTATION,)),
        ("norm", 8, (Level.DIAGONAL,)),
        ("hidden", 12, (Level.PERMUTATION, Level.DIAGONAL)),
        ("output", 8, ()),
    ]
    behind = found[1]
    assert [e.weight for e in behind.absorbers] == ["b.0.weight"]
    assert [(e.weight, e.axis, e.role) for e in behind.sinks] == [("c.0.up.weight", 1, "product")]
    assert [r.lift for r in behind.limiting] == ["fold-norm-affine"]
    assert {r.operator for r in found[2].limiting} == {"relu"}
    assert "is returned as 'd'" in limits(found[3])


def test_every_axis_of_every_weight_is_described() -> None:
    spaces = _zoo("moe", "raise-norms")
    found = describe(spaces)
    told = {(e.weight, e.axis) for d in found for e in d.ends}
    program = spaces.program
    assert told == {(program.key(u.weight), u.axis) for u in spaces.uses if u.weight is not None}


def test_what_a_pass_lifts_is_lifted() -> None:
    (before,) = _of_kind(describe(_zoo("llama", "raise-norms")), "stream")
    (after,) = _of_kind(describe(_zoo("llama", "raise-norms, fold-norm-affine")), "stream")
    assert not before.admits(Level.ORTHOGONAL)
    assert "fold-norm-affine" in {r.lift for r in before.limiting}
    assert after.admits(Level.ORTHOGONAL)
    assert after.admits(Level.PERMUTATION)
    assert not after.admits(Level.LINEAR)
    assert "fold-norm-affine" not in {r.lift for r in after.reasons}


def test_reasons_name_every_layer_that_is_in_the_way() -> None:
    (stream,) = _of_kind(describe(_zoo("llama", "raise-norms")), "stream")
    (gain,) = [r for r in stream.limiting if r.lift == "fold-norm-affine"]
    assert len(gain.nodes) == len(set(gain.modules)) == 13  # two in each of six layers, and the last
    assert stream.around is None


@pytest.mark.parametrize("lift", [*LIFTS, "rotate(qk=true)", "rotate(orphans=true)"])
def test_passes_that_reasons_name_exist(lift: str) -> None:
    assert str(parse_pass(lift))


def test_heads_of_a_layer_are_one_row_and_layers_are_one_group() -> None:
    found = describe(_zoo("llama", "raise-norms"))
    heads = _of_kind(found, "heads")
    assert len(heads) == 6
    assert may_act(heads[0]) == "general linear, 2 × 32"
    assert (heads[0].width, max(e.copies for e in heads[0].sinks)) == (64, 2)
    rows = grouped(found)
    (row,) = [row for row in rows if row.first.kind == "heads"]
    assert (row.where, len(row.members)) == ("layers.0–5.self_attn", 6)
    assert row.lines() == [("←", ["v_proj"]), ("→", ["o_proj"])]
    assert len(rows) <= 12 < len(grouped(found, every=True)) == len(found)


def test_queries_and_keys_under_a_rotary_embedding_say_why() -> None:
    found = _of_kind(describe(_zoo("llama", "raise-norms")), "query·key")
    assert found
    assert all(Level.ORTHOGONAL not in d.levels and d.around == "rotate(qk=true)" for d in found)
    assert all(any(r.why == SPLITS[0] for r in d.limiting) for d in found)


def test_biases_and_ties() -> None:
    rows = grouped(describe(_zoo("opt", "raise-norms")))
    (stream,) = [row for row in rows if row.first.kind == "stream"]
    assert stream.ties == ["lm_head"]
    assert "layers.0–4.fc2 + bias" in dict(stream.lines())["←"]
    assert {"fold-norm-affine", "center-norm"} <= {r.lift for r in stream.first.limiting}


def test_the_table_and_the_data_have_every_row() -> None:
    rows = grouped(describe(_zoo("opt", "raise-norms")))
    assert table(rows).row_count == len(rows)
    data = as_data(rows)
    assert len(data) == sum(len(row.members) for row in rows)
    assert {d["row"] for d in data} == set(range(len(rows)))
    assert all(limit["levels"] for d in data for limit in d["limits"])


def test_names() -> None:
    assert template("model.layers.3.mlp.w1.weight") == "model.layers.#.mlp.w1.weight"
    assert ranges([3, 1, 2, 7]) == "1–3, 7"
    assert merged(["a.0.b", "a.1.b", "c", "a.3.b"]) == ["a.[0–1, 3].b", "c"]
    assert braced(["e", "l.a.q", "l.a.k", "l.m", "n"]) == "e, l.{a.{q, k}, m}, n"
    assert plain("model.decoder.layers.0.fc1.weight") == "layers.0.fc1"


def test_like_layers_are_drawn_once() -> None:
    spaces = _zoo("llama", "raise-norms, fold-norm-affine")
    rows = grouped(describe(spaces))
    made = drawing(spaces, rows)
    assert [label for label, _ in made.frames] == ["layers 0–5  × 6"]
    labels = [box.label for box in made.boxes]
    assert labels.count("q_proj") == labels.count("attention") == labels.count("down_proj") == 1
    assert labels.count("rms_norm") == 3
    names = {(made.boxes[e.start].label, made.boxes[e.end].label) for e in made.edges}
    assert {("q_proj", "attention"), ("silu", "×"), ("o_proj", "+"), ("lm_head", "logits")} <= names
    stream = next(i for i, row in enumerate(rows) if row.first.kind == "stream")
    assert {e.row for e in made.edges if made.boxes[e.end].label in ("rms_norm", "q_proj", "lm_head")} == {stream}
    (heads,) = (i for i, row in enumerate(rows) if row.first.kind == "heads")
    assert {e.row for e in made.edges if made.boxes[e.start].label == "v_proj"} == {heads}
    (output,) = (box for box in made.boxes if box.label == "o_proj")
    assert (output.before, output.behind) == (heads, stream)


def test_the_picture_is_well_formed_and_tells_all() -> None:
    spaces = _zoo("moe", "raise-norms")
    found = describe(spaces)
    svg = draw(spaces, found)
    root = ET.fromstring(svg)
    titles = [t.text or "" for t in root.iter("{http://www.w3.org/2000/svg}title")]
    assert any("fold-norm-affine" in t for t in titles)
    assert any("router" in t or "mlp.gate" in t for t in titles)
    page = draw(spaces, found, page=True)
    assert svg in page
    assert not re.search(r'(src|href)="', page)  # nothing is loaded from elsewhere


def test_boxes_do_not_overlap_and_edges_go_down() -> None:
    widths = [60.0, 80.0, 40.0, 60.0, 28.0, 90.0]
    edges = [(0, 1), (0, 2), (0, 4), (1, 3), (2, 3), (3, 4), (4, 5)]
    at = placed(widths, edges)
    assert all(at.row[a] < at.row[b] for a, b in edges)
    for i in range(len(widths)):
        for j in range(i):
            if at.row[i] == at.row[j]:
                assert abs(at.x[i] - at.x[j]) >= (widths[i] + widths[j]) / 2
    (skip,) = [points for points, edge in zip(at.bends, edges, strict=True) if edge == (0, 4)]
    assert [row for _, row in skip] == [1, 2]
    assert len({x for x, _ in skip}) == 1
