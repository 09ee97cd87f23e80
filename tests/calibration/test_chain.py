"""Where programs are cut."""

from __future__ import annotations

from calibration.tiny import decoder

from qcompile.calibration.chain import Chain, Target, cut
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program


def targets(program: Program, *but: str) -> list[Target]:
    """The inputs of all products with weights."""
    return [Target(c.node, c.input) for c in find_contractions(program) if c.node.name not in but]


def parsed(body: str, weights: str, inputs: str = "x: f32[batch, 8]", out: str = "y") -> Program:
    return Program.parse(f"def main({inputs}, *, {weights}):\n    {body}\n    return {{'y': {out}}}")


def read(chain: Chain) -> list[tuple[int, tuple[str, ...], list[str]]]:
    """Segment, what the stage starts from, and what looks at values in it."""
    return [(stage.segment, stage.starts, [t.at.name for t in stage.targets]) for stage in chain.stages]


def test_a_layer_is_two_segments_of_two_stages() -> None:
    program = decoder(2)
    chain = cut(program, targets(program))
    assert read(chain) == [
        (0, (), ["q0", "k0", "v0"]),
        (0, ("x", "s0"), ["o0"]),
        (1, ("x0",), ["t0", "u0"]),
        (1, ("x0", "p0"), ["d0"]),
        (2, ("y0",), ["q1", "k1", "v1"]),
        (2, ("y0", "s1"), ["o1"]),
        (3, ("x1",), ["t1", "u1"]),
        (3, ("x1", "p1"), ["d1"]),
        (4, ("y1",), ["z"]),
    ]
    assert chain.segments == 5
    assert chain.describe() == "15 places in 5 segments and 9 stages, at most 2 values between stages"


def test_each_stage_ends_where_the_next_one_starts() -> None:
    program = decoder(3)
    chain = cut(program, targets(program))
    assert [s.ends for s in chain.stages[:-1]] == [s.starts for s in chain.stages[1:]]
    assert chain.stages[-1].ends == ()


def test_without_true_sequential_a_segment_is_one_stage() -> None:
    program = decoder(2)
    chain = cut(program, targets(program), sequential=False)
    assert read(chain)[:2] == [(0, (), ["q0", "k0", "v0", "o0"]), (1, ("x0",), ["t0", "u0", "d0"])]
    assert chain.segments == len(chain.stages) == 5


def test_nothing_to_look_at() -> None:
    chain = cut(decoder(1), [])
    assert chain.stages == ()
    assert chain.segments == 0


def test_parallel_blocks_are_one_segment() -> None:
    p = parsed(
        """n = aten.relu.default(z)
    a = aten.linear.default(n, w1)
    b = aten.linear.default(n, w2)
    ra = aten.relu.default(a)
    rb = aten.relu.default(b)
    c = aten.linear.default(ra, w3)
    d = aten.linear.default(rb, w4)
    s = aten.add.Tensor(z, c)
    t = aten.add.Tensor(s, d)
    y = aten.linear.default(t, w5)""".replace("n = ", "z = aten.linear.default(x, w0)\n    n = "),
        ", ".join(f"w{i}: f32[8, 8]" for i in range(6)),
    )
    assert read(cut(p, targets(p))) == [
        (0, (), ["z"]),
        (1, ("z",), ["a", "b"]),
        (1, ("z", "b", "ra"), ["c", "d"]),
        (2, ("t",), ["y"]),
    ]


def test_an_encoders_output_is_carried() -> None:
    """Every decoder layer reads it: it lives beside the stream, which is where the cuts are."""
    layers = 6
    lines, x = ["m = aten.linear.default(memory, wm)", "y0 = aten.linear.default(x, w0)"], "y0"
    for i in range(1, layers + 1):
        lines += [f"c{i} = aten.linear.default(m, w{i})", f"k{i} = aten.linear.default({x}, v{i})"]
        lines += [f"a{i} = aten.mul.Tensor(k{i}, c{i})", f"y{i} = aten.add.Tensor({x}, a{i})"]
        x = f"y{i}"
    weights = ", ".join(f"w{i}: f32[8, 8]" for i in ["m", *range(layers + 1)])
    weights += "".join(f", v{i}: f32[8, 8]" for i in range(1, layers + 1))
    p = parsed("\n    ".join(lines), weights, "x: f32[batch, 8], memory: f32[batch, 8]", x)
    chain = cut(p, targets(p))
    assert chain.carried == ("m",)
    assert chain.describe().endswith("; m carried along")
    streams = [set(stage.starts) - {"m"} for stage in chain.stages[2:]]
    assert all(len(found) == 1 for found in streams)  # the stream, or what comes of it
    assert chain.segments == layers + 3


def test_a_program_without_a_stream_is_one_segment() -> None:
    """Each value is read by the next two products: at no place is one alive alone."""
    lines = ["a0 = aten.linear.default(x, w0)", "a1 = aten.linear.default(a0, w1)"]
    for i in range(2, 6):
        lines += [f"s{i} = aten.mul.Tensor(a{i - 1}, a{i - 2})", f"a{i} = aten.linear.default(s{i}, w{i})"]
    lines += ["s6 = aten.mul.Tensor(a5, a4)"]
    p = parsed("\n    ".join(lines), ", ".join(f"w{i}: f32[8, 8]" for i in range(6)), out="s6")
    chain = cut(p, targets(p))
    assert len(chain.stages) == 6  # each product reads what the one before it gives
    assert [stage.segment for stage in chain.stages] == [0, 1, 1, 1, 1, 2]  # a0 and s5 are alive alone, no other
    assert max(len(stage.starts) for stage in chain.stages) == 2


def test_a_target_that_nothing_else_reads() -> None:
    p = parsed(
        """a = aten.linear.default(x, w0)
    b = aten.relu.default(a)
    c = aten.tanh.default(a)
    y = aten.linear.default(c, w1)""",
        "w0: f32[8, 8], w1: f32[8, 8]",
        out="y, 'b': b",
    )
    unread = next(n for n in p.nodes if n.name == "b")
    chain = cut(p, [*targets(p), Target(unread, unread, changes=False)])
    assert read(chain) == [(0, (), ["a"]), (1, ("a",), ["b"]), (2, ("c",), ["y"])]


def test_an_input_of_the_program_is_a_target() -> None:
    p = parsed("y = aten.linear.default(x, w)", "w: f32[8, 8]")
    assert read(cut(p, targets(p))) == [(0, (), ["y"])]
    (x,) = p.inputs
    assert read(cut(p, [*targets(p), Target(x, x, changes=False)])) == [(0, (), ["x", "y"])]


def test_a_weight_that_two_products_read() -> None:
    p = parsed(
        """a = aten.linear.default(x, w)
    r = aten.relu.default(a)
    y = aten.linear.default(r, w)""",
        "w: f32[8, 8]",
    )
    assert read(cut(p, targets(p))) == [(0, (), ["a"]), (1, ("a",), ["y"])]


def test_parts_of_a_tuple_are_kept_and_not_the_tuple() -> None:
    p = parsed(
        """a = aten.linear.default(x, w0)
    s = aten.split.Tensor(a, 4, -1)
    b = aten.linear.default(a, w1)
    l = operator.getitem(s, 0)
    r = operator.getitem(s, 1)
    c = aten.relu.default(b)
    d = aten.linear.default(c, w2)
    e = aten.mul.Tensor(l, r)
    f = aten.mul.Tensor(d, e)
    y = aten.linear.default(f, w3)""",
        "w0: f32[8, 8], w1: f32[4, 8], w2: f32[4, 4], w3: f32[4, 4]",
    )
    chain = cut(p, targets(p))
    kept = [name for stage in chain.stages for name in stage.starts]
    assert "s" not in kept
    assert {"l", "r"} <= set(kept)
