"""expand: the text that comes out, where the zeros stand, and every reason to leave a space as wide as it is."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile import run_passes
from qcompile.drift import drift
from qcompile.errors import RecipeError
from qcompile.hadamard import known
from qcompile.ir.program import Program
from qcompile.pass_base import Report, parse_pass
from qcompile.passes.permute.expand import Expand

PARTS = {
    "chunk": ["p: tuple[{t}, {t}] = aten.chunk.default(h, 2, -1)", "{get}"],
    "split": ["p: tuple[{t}, {t}] = aten.split.Tensor(h, {n}, -1)", "{get}"],
    "sizes": ["p: tuple[{t}, {t}] = aten.split_with_sizes.default(h, [{n}, {n}], -1)", "{get}"],
    "slices": [
        "g: {t} = aten.slice.Tensor(h, -1, 0, {n})",
        "u: {t} = aten.slice.Tensor(h, -1, {n}, 9223372036854775807)",
    ],
    "slices from the end": [
        "g: {t} = aten.slice.Tensor(h, 1, None, -{n})",
        "u: {t} = aten.slice.Tensor(h, 1, -{n}, None)",
    ],
    "a view": [
        "v: f64[batch, 2, {n}] = aten.view.default(h, [-1, 2, {n}])",
        "p: tuple[{t}, {t}] = aten.unbind.int(v, 1)",
        "{get}",
    ],
}


def fused(kind: str, n: int) -> str:
    """A fused gate and up projection of n channels each, taken apart in one of many ways."""
    t = f"f64[batch, {n}]"
    get = f"g: {t} = operator.getitem(p, 0)\n    u: {t} = operator.getitem(p, 1)"
    parts = "\n    ".join(line.format(t=t, n=n, get=get) for line in PARTS[kind])
    return f"""\
def main(x: f64[batch, 6], *, up: f64[{2 * n}, 6], b: f64[{2 * n}], down: f64[5, {n}]):
    h: f64[batch, {2 * n}] = aten.linear.default(x, up, b)
    {parts}
    s: {t} = aten.sigmoid.default(g)
    m: {t} = aten.mul.Tensor(s, u)
    y: f64[batch, 5] = aten.linear.default(m, down)
    return {{"y": y}}"""


def expanded(text: str, pass_: Expand, feeds: Callable[..., Any]) -> tuple[Program, Report]:
    """The program behind the pass, which must keep the function."""
    program = Program.parse(text)
    inputs = feeds(program)
    expected = program.run(inputs)
    (report,) = run_passes(program, [pass_])
    assert drift(program.run(inputs), expected) <= 1e-12
    return program, report


@pytest.mark.parametrize("kind", PARTS)
def test_sizes_in_the_graph_follow(kind: str, feeds: Callable[..., Any]) -> None:
    before = Program.parse(fused(kind, 18)).weights
    program, report = expanded(fused(kind, 18), Expand(), feeds)
    text = str(program)
    if kind == "slices from the end":  # they are counted from the start now
        text = text.replace("(h, 1, None, 20)", "(h, 1, None, -20)").replace("(h, 1, 20, None)", "(h, 1, -20, None)")
    assert text == fused(kind, 20)
    up, down = program.weights["up"], program.weights["down"]
    assert torch.equal(up.view(2, 20, 6)[:, :18], before["up"].view(2, 18, 6))
    assert torch.equal(down[:, :18], before["down"])
    assert not up.view(2, 20, 6)[:, 18:].any()
    assert not down[:, 18:].any()
    assert not program.weights["b"].view(2, 20)[:, 18:].any()
    assert report.measured["up … down"]["added"] == 2 * 2 * 7 + 2 * 5
    assert report.rewritten[0].what == "18 ⟶ 20 channels, its weights 11.1% larger"


STREAM = """\
def main(
    ids: i64[batch, sequence], *, table: f64[9, {n}], up: f64[8, {n}], down: f64[{n}, 8], bias: f64[{n}], {gain}head: f64[5, {n}]
):
    x: f64[batch, sequence, {n}] = aten.embedding.default(table, ids)
    rms: f64[batch, sequence, {n}] = aten.rms_norm.default(x, [{n}], {first}, {eps})
    h: f64[batch, sequence, 8] = aten.linear.default(rms, up)
    a: f64[batch, sequence, 8] = aten.gelu.default(h)
    o: f64[batch, sequence, {n}] = aten.linear.default(a, down, bias)
    z: f64[batch, sequence, {n}] = aten.add.Tensor(x, o)
    last: f64[batch, sequence, {n}] = aten.rms_norm.default(z, [{n}], None, {eps})
    y: f64[batch, sequence, 5] = aten.linear.default(last, head)
    return {{"y": y}}"""


def test_a_stream_with_a_gain_and_without(feeds: Callable[..., Any]) -> None:
    text = STREAM.format(n=6, gain="g: f64[6], ", first="g", eps=0.25)
    before = Program.parse(text).weights
    program, _ = expanded(text, Expand(stream=True, hidden=False), feeds)
    assert str(program) == str(Program.parse(STREAM.format(n=8, gain="g: f64[8], ", first="g", eps=0.1875)))
    factor = (6 / 8) ** 0.5
    assert torch.allclose(program.weights["g"][:6], before["g"] * factor, rtol=1e-15)
    assert torch.allclose(program.weights["head"][:, :6], before["head"] * factor, rtol=1e-15)
    assert torch.equal(program.weights["up"][:, :6], before["up"])
    assert not program.weights["table"][:, 6:].any()
    assert not program.weights["bias"][6:].any()


def test_a_norm_that_no_weight_can_take_the_factor_of_is_multiplied(feeds: Callable[..., Any]) -> None:
    text = (
        STREAM.format(n=6, gain="", first="None", eps=0.25)
        .replace('{"y": y}', '{"y": y, "t": t}')
        .replace("    return", "    t: f64[batch, sequence, 9] = aten.linear.default(last, table)\n    return")
    )
    program, _ = expanded(text, Expand(stream=True, hidden=False), feeds)
    assert f"aten.mul.Tensor(last, {0.75**0.5})" in str(program)
    assert str(program).count("aten.mul.Tensor") == 1  # the first norm's weight takes it


def test_default_eps_is_that_of_the_dtype(feeds: Callable[..., Any]) -> None:
    text = STREAM.format(n=6, gain="", first="None", eps=None)
    program, _ = expanded(text, Expand(stream=True, hidden=False), feeds)
    assert f"[8], None, {torch.finfo(torch.float64).eps * 0.75}" in str(program)


def test_widened_channels_rotate(feeds: Callable[..., Any]) -> None:
    program = Program.parse(fused("chunk", 18))
    inputs = feeds(program)
    expected = program.run(inputs)
    (alone,) = run_passes(program.clone(), "rotate(orphans=true)")
    assert any("no Hadamard matrix of order 18" in entry.what for entry in alone.skipped)
    run_passes(program, "expand, rotate(orphans=true)")
    assert "hadamard.default(m, 20, 20)" in str(program)
    assert drift(program.run(inputs), expected) <= 1e-12


@pytest.mark.parametrize(
    ("pass_", "old", "new"),
    [
        (Expand(), 18, 20),
        (Expand(), 20, 20),
        (Expand(step=1), 18, 20),
        (Expand(step=1), 20, 24),
        (Expand(step=3), 20, 32),
        (Expand(to="multiple", step=32), 18, 32),
        (Expand(to="multiple", step=32), 64, 64),
        (Expand(largest_factor=12), 18, 24),
        (Expand(largest_factor=2), 18, 32),
        (Expand(), 11008, 11008),
    ],
)
def test_widths(pass_: Expand, old: int, new: int) -> None:
    assert pass_.width(old) == new
    assert known(new)


def change(*pairs: tuple[str, str], text: str = fused("chunk", 18)) -> str:
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


_STREAM = STREAM.format(n=6, gain="", first="None", eps=0.25)
NEAR_MISSES = {
    "wide enough": (fused("chunk", 20), "its width 20 is one already"),
    "in turn": (
        change(
            ("slice.Tensor(h, -1, 0, 18)", "slice.Tensor(h, -1, 0, 36, 2)"),
            ("slice.Tensor(h, -1, 18, 9223372036854775807)", "slice.Tensor(h, -1, 1, 36, 2)"),
            text=fused("slices", 18),
        ),
        "weight 'up' has its channels in another order, or in turn with others",
    ),
    "a sum over channels": (
        change(("{\"y\": y}", "{\"y\": y, \"t\": t}"), ("    return", "    t: f64[batch] = aten.sum.dim_IntList(m, [-1])\n    return")),
        "m is read by t as a whole",
    ),
    "a softmax": (
        change(("aten.sigmoid.default(g)", "aten.softmax.int(g, -1)")),
        "s (aten.softmax.int) is not known to leave other channels as they are",
    ),
    "infinite at zero": (
        change(("aten.sigmoid.default(g)", "aten.log.default(g)")),
        "s (aten.log.default) is not known to leave other channels as they are",
    ),
    "a negative power": (
        change(("aten.sigmoid.default(g)", "aten.pow.Tensor_Scalar(g, -2)")),
        "s raises zeros to a power that is not positive",
    ),
    "a layer norm": (
        change(("rms_norm.default(z, [6], None, 0.25)", "layer_norm.default(z, [6], None, None, 0.25)"), text=_STREAM),
        "last (aten.layer_norm.default) is not known to leave other channels as they are",
    ),
    "not 0 at a norm": (
        change(("    last", "    c: f64[batch, sequence, 6] = aten.cos.default(z)\n    last"), ("default(z, [6]", "default(c, [6]"), text=_STREAM),
        "c (cos) need not keep a channel at 0, and a norm reads it",
    ),
    "a number before a norm": (
        change(("    last", "    c: f64[batch, sequence, 6] = aten.add.Tensor(z, 1.5)\n    last"), ("default(z, [6]", "default(c, [6]"), text=_STREAM),
        "c adds 1.5 to channels that a norm reads",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str, left_alone: Callable[..., Any]) -> None:
    text, reason = NEAR_MISSES[name]
    assert reason in left_alone(Expand(stream=True), text)


def test_heads_stay_as_wide_as_they_are(left_alone: Callable[..., Any]) -> None:
    text = """\
    def main(q: f64[2, 2, sequence, 6], k: f64[2, 2, sequence, 6], x: f64[2, sequence, 8], *, v: f64[6, 8], o: f64[7, 6]):
        a: f64[2, sequence, 6] = aten.linear.default(x, v)
        b: f64[2, sequence, 2, 3] = aten.view.default(a, [2, -1, 2, 3])
        c: f64[2, 2, sequence, 3] = aten.transpose.int(b, 1, 2)
        d: f64[2, 2, sequence, 3] = aten.scaled_dot_product_attention.default(q, k, c)
        e: f64[2, sequence, 2, 3] = aten.transpose.int(d, 1, 2)
        f: f64[2, sequence, 6] = aten.flatten.using_ints(e, 2, 3)
        y: f64[2, sequence, 7] = aten.linear.default(f, o)
        return {"y": y}"""
    assert left_alone(Expand(), text) == ["the width of a head stays: attention, and a cache, say it too"]


def test_kinds_that_are_not_asked_for(left_alone: Callable[..., Any]) -> None:
    assert left_alone(Expand(hidden=False), textwrap.dedent(fused("chunk", 18))) == []


def test_bfloat16_is_padded_to_the_bit(feeds: Callable[..., Any]) -> None:
    text = fused("chunk", 18).replace("f64", "bf16")
    before = Program.parse(text).weights
    program = Program.parse(text)
    run_passes(program, "expand")
    assert torch.equal(program.weights["down"][:, :18], before["down"])
    assert program.weights["down"].dtype == torch.bfloat16


@pytest.mark.parametrize("text", ["expand(to=multiple)", "expand(step=0)", "expand(to=multiple, step=-4)"])
def test_steps_that_make_no_sense(text: str) -> None:
    with pytest.raises(RecipeError, match="step"):
        run_passes(Program.parse(fused("chunk", 18)), text)


def test_prints_and_parses_back() -> None:
    pass_ = Expand(stream=True, to="multiple", step=32, largest_factor=64)
    assert parse_pass(str(pass_)) == pass_
