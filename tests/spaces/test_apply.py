"""Edits: what a transformation does to each weight, and which weights are parted for it."""

from __future__ import annotations

import torch

from qcompile.hadamard.rotation import RandomOrthogonal
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces import Level, channel_spaces
from qcompile.spaces.apply import Edits

TWO = """def main(x: f64[batch, 6], *, w: f64[4, 6], b: f64[4], o: f64[5, 4], p: f64[4, 3]):
    h = aten.linear.default(x, w, b)
    y = aten.linear.default(h, o)
    z = aten.mm.default(h, p)
    return {"y": y, "z": z}"""
TIED = """def main(ids: i64[batch], *, t: f64[9, 4]):
    x = aten.embedding.default(t, ids)
    n = aten.rms_norm.default(x, [4], None, 0.01)
    y = aten.linear.default(n, t)
    return {"y": y}"""


def test_sources_and_sinks() -> None:
    """h ← T·h: rows of w and b by T, columns of o and rows of p by T⁻¹."""
    program = Program.parse(TWO)
    old = {key: program.weights[key] for key in program.weights}
    spaces = channel_spaces(program)
    (space,) = spaces[Level.ORTHOGONAL]
    rotation = RandomOrthogonal(4, 0)
    t = rotation.matrix()
    edits = Edits(spaces, Report())
    edits.rotate(space, rotation)
    assert torch.equal(program.weights["w"], old["w"])  # nothing is written before commit
    edits.commit()
    for key, expected in (("w", t @ old["w"]), ("b", t @ old["b"]), ("o", old["o"] @ t.T), ("p", t @ old["p"])):
        assert torch.allclose(program.weights[key], expected, atol=1e-14), key


def test_scales_and_orders() -> None:
    factors = torch.tensor([2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    order = torch.tensor([2, 0, 3, 1])
    for kind in ("scale", "permute"):
        program = Program.parse(TWO)
        old = {key: program.weights[key] for key in program.weights}
        spaces = channel_spaces(program)
        edits = Edits(spaces, Report())
        if kind == "scale":
            edits.scale(spaces[Level.DIAGONAL][0], factors)
            expected = {"w": old["w"] * factors[:, None], "b": old["b"] * factors, "o": old["o"] / factors, "p": old["p"] / factors[:, None]}  # fmt: skip
        else:
            edits.permute(spaces[Level.PERMUTATION][0], order)
            expected = {"w": old["w"][order], "b": old["b"][order], "o": old["o"][:, order], "p": old["p"][order]}
        edits.commit()
        for key, tensor in expected.items():
            assert torch.equal(program.weights[key], tensor), (kind, key)


def test_a_tied_weight_is_rotated_once() -> None:
    program = Program.parse(TIED)
    old = program.weights["t"]
    spaces = channel_spaces(program)
    report = Report()
    edits = Edits(spaces, report)
    edits.rotate(spaces[Level.ORTHOGONAL][0], RandomOrthogonal(4, 0))
    edits.commit()
    assert set(program.weights) == {"t"}
    assert report.notes == []
    assert torch.allclose(program.weights["t"], old @ RandomOrthogonal(4, 0).matrix().T, atol=1e-14)


def test_a_tied_weight_is_parted_where_one_reader_changes() -> None:
    program = Program.parse(TIED)
    old = program.weights["t"]
    spaces = channel_spaces(program)
    report = Report()
    edits = Edits(spaces, report)
    (sink,) = spaces[Level.ORTHOGONAL][0].sinks
    factors = torch.tensor([2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    edits.multiply(sink, factors)
    edits.commit()
    program.verify()
    assert report.notes == ["'t' is untied for y: 0.0 MB more"]
    assert torch.equal(program.weights["t"], old)
    assert torch.equal(program.weights["t.untied"], old * factors)


def test_two_edits_of_one_weight() -> None:
    """Rows and columns of one matrix, each in a space of its own."""
    program = Program.parse(
        TIED.replace("t: f64[9, 4]", "t: f64[9, 4], u: f64[4, 4], v: f64[4, 4]").replace(
            "n = aten.rms_norm.default(x,",
            "a = aten.linear.default(x, u)\n    c = aten.linear.default(a, v)\n    n = aten.rms_norm.default(c,",
        )
    )
    old = program.weights["v"]
    spaces = channel_spaces(program)
    edits = Edits(spaces, Report())
    for i, space in enumerate(spaces[Level.ORTHOGONAL]):
        edits.rotate(space, RandomOrthogonal(4, i))
    edits.commit()
    seeds = {
        p.use.kind: i
        for i, s in enumerate(spaces[Level.ORTHOGONAL])
        for p in s.placements
        if p.use.weight is not None and p.use.weight.name == "v"
    }
    rows, columns = (RandomOrthogonal(4, seeds[kind]).matrix() for kind in ("source", "sink"))
    assert seeds["source"] != seeds["sink"]
    assert torch.allclose(program.weights["v"], rows @ old @ columns.T, atol=1e-13)


def test_a_product_that_reads_keys_is_scaled_with_the_queries() -> None:
    """Keys are divided by the factors, so what else reads them is multiplied."""
    program = Program.parse("""def main(x: f64[batch, sequence, 6], *, q: f64[4, 6], k: f64[4, 6], o: f64[5, 4]):
    a = aten.linear.default(x, q)
    b = aten.linear.default(x, k)
    t = aten.transpose.int(b, 1, 2)
    s = aten.matmul.default(a, t)
    y = aten.linear.default(b, o)
    return {"y": y, "s": s}""")
    old = {key: program.weights[key] for key in program.weights}
    spaces = channel_spaces(program)
    factors = torch.tensor([2.0, 0.5, 4.0, 1.0], dtype=torch.float64)
    edits = Edits(spaces, Report())
    edits.scale(spaces[Level.DIAGONAL][0], factors)
    edits.commit()
    assert torch.equal(program.weights["q"], old["q"] * factors[:, None])
    assert torch.equal(program.weights["k"], old["k"] / factors[:, None])
    assert torch.equal(program.weights["o"], old["o"] * factors)


def test_a_table_is_parted_where_its_head_changes_rows() -> None:
    """The embedding reads the same rows, though the analysis has no use of it along them."""
    program = Program.parse("""def main(ids: i64[batch], *, t: f64[9, 4], o: f64[5, 9]):
    x = aten.embedding.default(t, ids)
    h = aten.linear.default(x, t)
    y = aten.linear.default(h, o)
    return {"y": y}""")
    old = program.weights["t"]
    spaces = channel_spaces(program)
    edits = Edits(spaces, Report())
    rows = next(p for s in spaces[Level.DIAGONAL] for p in s.sources if p.node.name == "h")
    edits.multiply(rows, torch.full((rows.positions.shape[1],), 2.0, dtype=torch.float64))
    edits.commit()
    program.verify()
    assert torch.equal(program.weights["t"], old)
    assert set(program.weights) == {"t", "o", "t.untied"}
