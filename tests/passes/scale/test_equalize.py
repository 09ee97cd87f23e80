"""Equalize: the paper's ranges, chains, both sides of attention, bounds, what it is worth, what it leaves alone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable

import pytest
import torch
from oracles import diagonal_scales
from torch import Tensor

from qcompile import run_passes
from qcompile.drift import drift
from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import Report, parse_pass

aten = torch.ops.aten

CHAIN = """\
    def main(x: f64[batch, 5], *, w1: f64[6, 5], b1: f64[6], w2: f64[7, 6], w3: f64[4, 7], b3: f64[4]):
        h1 = aten.linear.default(x, w1, b1)
        a1 = aten.relu.default(h1)
        h2 = aten.linear.default(a1, w2)
        a2 = aten.relu.default(h2)
        y = aten.linear.default(a2, w3, b3)
        return {"y": y}"""


def parse(text: str) -> Program:
    """A program whose channels differ in range by orders of magnitude."""
    program = Program.parse(textwrap.dedent(text), None, seed=2)
    generator = torch.Generator().manual_seed(9)
    for node in program.weight_nodes:
        weight = program.weight(node)
        if weight.ndim == 2 and weight.is_floating_point():
            spread = [torch.randn(n, generator=generator, dtype=torch.float64).mul(2).exp() for n in weight.shape]
            program.set_weight(node, weight * spread[0][:, None] * spread[1])
    return program


def equalized(program: Program, feeds: Callable[..., dict[str, Tensor]], passes: str = "equalize") -> Report:
    inputs = feeds(program)
    before = program.run(inputs)
    (report,) = run_passes(program, passes)
    assert drift(program.run(inputs), before) <= 1e-12
    return report


def rows(weight: Tensor) -> Tensor:
    return weight.abs().amax(1)


def columns(weight: Tensor) -> Tensor:
    return weight.abs().amax(0)


@pytest.mark.parametrize("rounds", [1, 3])
def test_a_chain_is_what_the_paper_makes_of_it(rounds: int, feeds: Callable[..., dict[str, Tensor]]) -> None:
    program, old = parse(CHAIN), parse(CHAIN)
    equalized(program, feeds, f"equalize(iterations={rounds}, tolerance=0.0)")
    expected = diagonal_scales.equalize_chain([old.weights[f"w{i}"].tolist() for i in (1, 2, 3)], rounds)
    for i, matrix in enumerate(expected, 1):
        wanted = torch.tensor(matrix, dtype=torch.float64)
        torch.testing.assert_close(program.weights[f"w{i}"], wanted, rtol=1e-12, atol=0)


def test_ranges_agree_in_the_end(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = parse(CHAIN)
    report = equalized(program, feeds, "equalize(iterations=200, tolerance=1e-9)")
    w = program.weights
    torch.testing.assert_close(rows(w["w1"]), columns(w["w2"]), rtol=1e-7, atol=0)
    torch.testing.assert_close(rows(w["w2"]), columns(w["w3"]), rtol=1e-7, atol=0)
    assert int(report.notes[-1].split(" rounds")[0]) < 200  # it stopped when nothing moved


def test_root_mean_square(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = parse(CHAIN)
    equalized(program, feeds, "equalize(iterations=200, tolerance=1e-9, measure=rms)")
    first, second = program.weights["w1"].square().mean(1), program.weights["w2"].square().mean(0)
    torch.testing.assert_close(first, second, rtol=1e-7, atol=0)


SEVERAL = """\
    def main(x: f64[batch, 5], *, p: f64[6, 5], q: f64[6, 5], r: f64[3, 6], s: f64[6, 4]):
        hp = aten.linear.default(x, p)
        hq = aten.linear.default(x, q)
        h = aten.add.Tensor(hp, hq)
        y = aten.linear.default(h, r)
        z = aten.matmul.default(h, s)
        return {"y": y, "z": z}"""


def test_the_largest_of_several_weights_counts(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program = parse(SEVERAL)
    equalized(program, feeds)
    w = program.weights
    made, read = torch.maximum(rows(w["p"]), rows(w["q"])), torch.maximum(columns(w["r"]), rows(w["s"]))
    torch.testing.assert_close(made, read, rtol=1e-12, atol=0)


NORMED = """\
    def main(x: f64[batch, 5], *, w1: f64[6, 5], gain: f64[6], w2: f64[7, 6]):
        h = aten.linear.default(x, w1)
        n = aten.rms_norm.default(h, [6], gain, 0.01)
        y = aten.linear.default(n, w2)
        return {"y": y}"""


def test_gains_count_when_asked(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program, old = parse(NORMED), parse(NORMED)
    report = equalized(program, feeds)
    assert [(e.where, e.what) for e in report.skipped if e.where == "y"] == [
        ("y", "only gains of norms make its channels; norms=true lets them count")
    ]
    assert all(torch.equal(program.weights[key], old.weights[key]) for key in old.weights)
    equalized(program, feeds, "equalize(norms=true)")
    torch.testing.assert_close(program.weights["gain"].abs(), columns(program.weights["w2"]))


def test_dead_channels_stay_and_factors_are_bounded(feeds: Callable[..., dict[str, Tensor]]) -> None:
    program, old = parse(CHAIN), parse(CHAIN)
    for name, scale in (("w1", [1.0, 0.0, 1e-9, 1.0, 1.0, 1.0]), ("b1", [1.0, 1.0, 1e-9, 1.0, 1.0, 1.0])):
        node = program.weight_node(name)
        assert node is not None
        weight = program.weight(node)
        program.set_weight(node, weight * torch.tensor(scale).double().reshape([-1] + [1] * (weight.ndim - 1)))
    before = {name: program.weights[name] for name in program.weights}
    equalized(program, feeds, "equalize(bound=3.0, iterations=5)")
    change = rows(program.weights["w1"]) / rows(before["w1"])
    assert change[1].isnan()
    assert program.weights["b1"][1] == old.weights["b1"][1]
    alive = change[[0, 2, 3, 4, 5]]
    assert float(alive.max()) <= 3 * (1 + 1e-9)
    assert float(alive.min()) >= (1 - 1e-9) / 3
    torch.testing.assert_close(change[2], torch.tensor(3.0).double())


@pytest.mark.parametrize("measure", ["absmax", "rms"])
def test_a_reader_without_outputs_says_nothing(measure: str, feeds: Callable[..., dict[str, Tensor]]) -> None:
    """A slice of a weight may be empty: it is found with other products, and has no range."""
    read = CHAIN.replace("b3: f64[4]", "b3: f64[4], w4: f64[0, 6]")
    more = read.replace("        return", "        z = aten.linear.default(a1, w4)\n        return")
    program, alone = parse(more.replace('{"y": y}', '{"y": y, "z": z}')), parse(CHAIN)
    for name in alone.weights:
        program.weights[name] = alone.weights[name]
    for one in (program, alone):
        equalized(one, feeds, f"equalize(measure={measure})")
    assert all(torch.equal(program.weights[name], alone.weights[name]) for name in alone.weights)


@pytest.mark.parametrize(
    "bend", ["gelu.default(h1)", "silu.default(h1)", "clamp_min.default(h1, 0.5)", "relu6.default(h1)"]
)
def test_what_bends_each_element_keeps_its_channels(bend: str, feeds: Callable[..., dict[str, Tensor]]) -> None:
    program, old = parse(CHAIN.replace("relu.default(h1)", bend)), parse(CHAIN)
    report = equalized(program, feeds)
    assert torch.equal(program.weights["w1"], old.weights["w1"])
    assert [e.where for e in report.skipped] == ["h1", "h2"]
    assert report.skipped[0].what == "no weight makes what it reads"
    assert report.skipped[1].what.startswith("a1: ")


def test_gates_scale_through_one_factor_and_queries_meet_keys(embedded: Callable[[str], Program]) -> None:
    """In a Llama: up to down, values to output, queries to keys; the gate, which silu bends, keeps its scale."""
    program, old = embedded("llama"), embedded("llama")
    (report,) = run_passes(program, "equalize")
    stem = "model.layers.0."
    changed = {key for key in old.weights if not torch.equal(program.weights[key], old.weights[key])}
    parts = (
        "mlp.up_proj",
        "mlp.down_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "self_attn.q_proj",
        "self_attn.k_proj",
    )
    assert {f"{stem}{part}.weight" for part in parts} <= changed
    assert f"{stem}mlp.gate_proj.weight" not in changed
    up, down = program.weights[f"{stem}mlp.up_proj.weight"], program.weights[f"{stem}mlp.down_proj.weight"]
    torch.testing.assert_close(rows(up), columns(down), rtol=1e-2, atol=0)
    assert any(entry.where.endswith("(linear)") for entry in report.skipped)


def test_it_lowers_the_error_of_int8_weights(feeds: Callable[..., dict[str, Tensor]]) -> None:
    """With one scale a weight, a channel far below the largest is rounded to nothing."""

    def error(passes: str) -> float:
        program = parse(CHAIN)
        inputs = feeds(program)
        exact = program.run(inputs)["y"]
        run_passes(program, f"{passes}, insert-qdq(weights=int8 sym tensor)")
        return float((program.run(inputs)["y"] - exact).norm() / exact.norm())

    assert error("equalize") < 0.3 * error("dead-code")


@pytest.mark.parametrize("options", ["iterations=0", "tolerance=-1.0", "bound=0.5", "bound=.inf"])
def test_bad_options(options: str) -> None:
    with pytest.raises(RecipeError, match="give iterations >= 1"):
        run_passes(parse(CHAIN), f"equalize({options})")


def test_options_print_and_parse_back() -> None:
    pass_ = parse_pass("equalize(iterations=3, tolerance=0.1, measure=rms, norms=true, bound=9.0)")
    assert parse_pass(str(pass_)) == pass_
