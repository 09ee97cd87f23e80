"""Smooth: the paper's factors, every reason to leave channels alone, multiplications at run time, what it is worth."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracles import diagonal_scales
from torch import Tensor

from qcompile import run_passes
from qcompile.drift import drift
from qcompile.errors import QCompileError, RecipeError
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.pass_base import Report, parse_pass
from qcompile.passes.scale.readers import column_peaks

aten = torch.ops.aten

BLOCK = """\
    def main(
        input_ids: i64[batch, sequence],
        *, table: f64[90, 6], gain: f64[6], shift: f64[6], q: f64[4, 6], k: f64[5, 6], w: f64[7, 5], b: f64[7],
        down: f64[3, 7]
    ):
        e = aten.embedding.default(table, input_ids)
        n = aten.layer_norm.default(e, [6], gain, shift, 0.1)
        yq = aten.linear.default(n, q)
        yk = aten.linear.default(n, k)
        u = aten.linear.default(yk, w, b)
        a = aten.relu.default(u)
        y = aten.linear.default(a, down)
        return {"yq": yq, "y": y}"""


def parse(text: str, **weights: Tensor) -> Program:
    """A program whose weights are random but for those given."""
    program = Program.parse(textwrap.dedent(text), None, seed=4)
    for name, tensor in weights.items():
        node = program.weight_node(name)
        assert node is not None
        program.set_weight(node, tensor)
    return program


def value(program: Program, name: str, ids: Tensor) -> Tensor:
    """Rows of one value."""
    seen: dict[str, Any] = {}
    run(program, {"input_ids": ids}, lambda node, result: seen.update({node.name: result}))
    return seen[name].flatten(0, -2)


def smoothed(program: Program, tokens: list[Tensor], passes: str = "smooth") -> Report:
    before = program.run({"input_ids": tokens[0]})
    (report,) = run_passes(program, passes, tokens)
    assert drift(program.run({"input_ids": tokens[0]}), before) <= 1e-12
    return report


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_the_factors_are_the_papers(alpha: float, tokens: list[Tensor]) -> None:
    program, old = parse(BLOCK), parse(BLOCK)
    report = smoothed(program, tokens, f"smooth(alpha={alpha})")
    inputs = {name: torch.cat([value(old, name, ids) for ids in tokens]).tolist() for name in ("n", "yk", "a")}
    weights = {name: old.weights[name] for name in old.weights}

    def s(name: str, *readers: str) -> Tensor:
        factors = diagonal_scales.smoothquant(inputs[name], [weights[r].tolist() for r in readers], alpha)
        return torch.tensor(factors, dtype=torch.float64)

    norm, mid, last = s("n", "q", "k"), s("yk", "w"), s("a", "down")
    expected = {
        "table": weights["table"],
        "gain": weights["gain"] / norm,
        "shift": weights["shift"] / norm,
        "q": weights["q"] * norm,
        "k": weights["k"] * norm / mid[:, None],
        "w": weights["w"] * mid / last[:, None],
        "b": weights["b"] / last,
        "down": weights["down"] * last,
    }
    for name, tensor in expected.items():
        torch.testing.assert_close(program.weights[name], tensor, rtol=1e-12, atol=1e-14)
    assert len(report.rewritten) == 3
    assert report.skipped == []


def test_readers_of_several_tensors_share_the_largest_peak(tokens: list[Tensor]) -> None:
    """One product reads a ReLU, another what goes into it: the factor is for both."""
    text = BLOCK.replace("return {", 'z = aten.linear.default(u, other)\n        return {"z": z, ')
    program, old = (parse(text.replace("b: f64[7],", "b: f64[7], other: f64[4, 7],")) for _ in range(2))
    smoothed(program, tokens)
    peaks = torch.cat([value(old, "u", ids) for ids in tokens]).abs().amax(0)
    columns = torch.maximum(old.weights["other"].abs().amax(0), old.weights["down"].abs().amax(0))
    torch.testing.assert_close(program.weights["other"] / old.weights["other"], (peaks / columns).sqrt().expand(4, 7))


@pytest.mark.parametrize("alpha", [0.0, 0.5, 1.0])
def test_dead_channels_and_columns_keep_their_factor(alpha: float, tokens: list[Tensor]) -> None:
    gain, shift = torch.rand(6).double() + 0.5, torch.randn(6).double()
    gain[1] = shift[1] = 0
    q, k = torch.randn(4, 6).double(), torch.randn(5, 6).double()
    q[:, 2] = k[:, 2] = 0
    q[:, 3], k[:, 3] = 1e-300, 0  # next to nothing: the factor is bounded
    program = parse(BLOCK, gain=gain, shift=shift, q=q, k=k)
    smoothed(program, tokens, f"smooth(alpha={alpha})")
    assert all(bool(program.weights[name].isfinite().all()) for name in program.weights)
    assert program.weights["gain"][2] == gain[2]
    assert program.weights["gain"][1] == 0
    torch.testing.assert_close(program.weights["q"][:, 1], q[:, 1])
    assert 1e-5 <= float((gain[3] / program.weights["gain"][3]).abs()) <= 1e5 * (1 + 1e-9)


@pytest.mark.parametrize(
    "operator", ["gelu.default(u)", "silu.default(u)", "clamp_min.default(u, -0.1)", "add.Scalar(u, 1.0)"]
)
def test_what_bends_each_element_keeps_its_channels(operator: str, tokens: list[Tensor]) -> None:
    program = parse(BLOCK.replace("relu.default(u)", operator))
    report = smoothed(program, tokens)
    (entry,) = report.skipped
    assert entry.where == "y"
    assert entry.what.startswith("a: ")


def test_a_value_that_is_returned_keeps_its_channels(tokens: list[Tensor]) -> None:
    report = smoothed(parse(BLOCK.replace('"y": y', '"y": y, "n": n')), tokens)
    assert [(e.where, e.what) for e in report.skipped] == [(w, "output: is returned as 'n'") for w in ("yq", "yk")]


def test_rules_and_roles(tokens: list[Tensor]) -> None:
    old = parse(BLOCK)
    program = parse(BLOCK)
    report = smoothed(program, tokens, "smooth(rules=[{match: down, alpha: null}, {match: w, alpha: 0.9}])")
    assert [(e.where, e.what) for e in report.skipped] == [("y", "rules.0 says alpha: null")]
    assert [e.what for e in report.rewritten] == [
        "alpha 0.5: 6 channels, 2 products",
        "alpha 0.9: 5 channels, 1 products",
    ]
    assert torch.equal(program.weights["down"], old.weights["down"])
    half = parse(BLOCK)
    report = smoothed(half, tokens, "smooth(rules=[{match: q, alpha: null}])")  # q has no say, and is scaled along
    assert report.rewritten[0].what == "alpha 0.5: 6 channels, 1 products"
    s = half.weights["q"] / old.weights["q"]
    peaks = torch.cat([value(old, "n", ids) for ids in tokens]).abs().amax(0)
    torch.testing.assert_close(s[0], (peaks / old.weights["k"].abs().amax(0)).sqrt())


@pytest.mark.parametrize(
    ("passes", "message"),
    [
        ("smooth(alpha=1.5)", "alpha 1.5 is no share"),
        ("smooth(rules=[{match: q, alpha: 0.4}])", r"several alphas \(yq 0.4, yk 0.5\)"),
        ("smooth(rules=[{match: nowhere, alpha: 0.4}])", "'nowhere'"),
        ("smooth(rules=[{alpha: 0.4}])", "selector"),
    ],
)
def test_bad_options(passes: str, message: str, tokens: list[Tensor]) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        run_passes(parse(BLOCK), passes, tokens)
    assert "\n" not in str(caught.value)


def test_options_print_and_parse_back() -> None:
    text = "smooth(alpha=0.7, rules=[{alpha: null, match: '*.k'}], roles=[linear], insert=true)"
    pass_ = parse_pass(text)
    assert parse_pass(str(pass_)) == pass_


def test_bad_data(tokens: list[Tensor]) -> None:
    with pytest.raises(QCompileError, match="no tokens"):
        run_passes(parse(BLOCK), "smooth", [])
    table = torch.ones(90, 6).double()
    table[tokens[1][0, 0]] = float("nan")
    with pytest.raises(QCompileError, match="nan or infinite in calibration batch 1"):
        run_passes(parse(BLOCK, table=table), "smooth", tokens)


GELU_TWICE = """\
    def main(
        input_ids: i64[batch, sequence], *, table: f64[90, 6], w1: f64[4, 6], w2: f64[3, 4], w3: f64[5, 4], w4: f64[4, 2]
    ):
        e = aten.embedding.default(table, input_ids)
        h = aten.linear.default(e, w1)
        a = aten.gelu.default(h)
        y2 = aten.linear.default(a, w2)
        y3 = aten.linear.default(a, w3)
        y4 = aten.matmul.default(a, w4)
        y5 = aten.linear.default(h, w2)
        return {"a": a, "y2": y2, "y3": y3, "y4": y4, "y5": y5}"""


def test_inserted_factors_are_shared_and_the_papers(tokens: list[Tensor]) -> None:
    program, old = parse(GELU_TWICE), parse(GELU_TWICE)
    smoothed(program, tokens, "smooth(alpha=0.6, insert=true)")
    rows = torch.cat([value(old, "a", ids) for ids in tokens]).tolist()
    weights = [old.weights["w2"], old.weights["w3"], old.weights["w4"].T]
    expected = torch.tensor(diagonal_scales.smoothquant(rows, [w.tolist() for w in weights], 0.6), dtype=torch.float64)
    products = {n.name: n for n in program.nodes}
    readers = [products[name].args[0] for name in ("y2", "y3", "y4")]
    assert len(set(readers)) == 1
    assert readers[0].target is aten.mul.Tensor
    torch.testing.assert_close(program.weight(readers[0].args[1]), 1 / expected)
    torch.testing.assert_close(program.weights["w3"], old.weights["w3"] * expected)
    torch.testing.assert_close(program.weights["w4"], old.weights["w4"] * expected[:, None])


def test_insertion_parts_a_weight_that_others_read(tokens: list[Tensor]) -> None:
    """w2 reads `a`, which is multiplied, and `h`, which is multiplied by something else."""
    program = parse(GELU_TWICE)
    report = smoothed(program, tokens, "smooth(insert=true)")
    assert any("'w2' is untied" in note for note in report.notes)
    assert report.skipped == []


def test_nothing_is_inserted_where_it_folds(tokens: list[Tensor]) -> None:
    program = parse(BLOCK)
    smoothed(program, tokens, "smooth(insert=true)")
    assert program.calls(aten.mul.Tensor) == []


def test_grouped_heads_share_factors(embedded: Callable[[str], Program], tokens: list[Tensor]) -> None:
    """Values of one head go to several heads of the output projection, which have one factor for each."""
    program, old = embedded("llama"), embedded("llama")
    run_passes(program, "smooth", tokens)
    stem = "model.layers.0.self_attn"
    norm = (
        program.weights["model.layers.0.input_layernorm.weight"] / old.weights["model.layers.0.input_layernorm.weight"]
    )
    values = program.weights[f"{stem}.v_proj.weight"] / old.weights[f"{stem}.v_proj.weight"] * norm
    columns = program.weights[f"{stem}.o_proj.weight"] / old.weights[f"{stem}.o_proj.weight"]
    size = old.calls(aten.scaled_dot_product_attention.default)[0].meta["val"].shape[-1]
    heads, kept = columns.shape[1] // size, values.shape[0] // size
    assert heads > kept
    s = columns[0].view(kept, heads // kept, size)
    torch.testing.assert_close(s, s[:, :1].expand_as(s))
    torch.testing.assert_close(1 / values[:, 0], s[:, 0].reshape(-1))
    assert float((s - 1).abs().max()) > 0.1


def test_outliers_in_activations_are_smoothed(embedded: Callable[[str], Program], tokens: list[Tensor]) -> None:
    """Injected outliers cost int8 activations of one scale most of their accuracy; smoothing gives it back."""
    clean = embedded("llama")
    exact = clean.run(_feeds(clean, tokens[0]))["logits"]

    def error(passes: str) -> float:
        program = embedded("llama")
        quantize = "insert-qdq(activations=int8 sym tensor dynamic, weights=int8 sym channel)"
        run_passes(program, f"{passes}, {quantize}", tokens)
        return float((program.run(_feeds(program, tokens[0]))["logits"] - exact).norm() / exact.norm())

    inject = "inject-outliers(gain=100.0)"
    without, broken, mended = error("dead-code"), error(inject), error(f"{inject}, smooth")
    assert broken > 3 * without
    assert mended < 0.5 * broken


def _feeds(program: Program, ids: Tensor) -> dict[str, Tensor]:
    return fill(program, {"input_ids": ids})


def test_a_weight_without_rows_has_peaks_of_zero() -> None:
    program = Program.parse(
        """def main(x: f64[batch, 3], *, w: f64[0, 3]):
    y = aten.linear.default(x, w)
    return {"y": y}"""
    )
    (node,) = program.weight_nodes
    assert column_peaks(program, node, 1).tolist() == [0.0, 0.0, 0.0]


def test_groups_of_a_convolution_share_the_largest_peak(tokens: list[Tensor]) -> None:
    text = """\
        def main(input_ids: i64[batch, sequence], *, table: f64[90, 6], w: f64[8, 6], c: f64[4, 4, 1]):
            e = aten.embedding.default(table, input_ids)
            h = aten.linear.default(e, w)
            t = aten.transpose.int(h, 1, 2)
            v = aten.conv1d.default(t, c, None, [1], [0], [1], 2)
            return {"v": v}"""
    large = torch.ones(8, 1, dtype=torch.float64)
    large[5] = 100.0
    program, old = (
        parse(text, w=torch.randn(8, 6, generator=torch.Generator().manual_seed(0)).double() * large) for _ in range(2)
    )
    smoothed(program, tokens)
    peaks = torch.cat([value(old, "h", ids) for ids in tokens]).abs().amax(0).reshape(2, 4).amax(0)
    factors = (peaks / old.weights["c"].abs().amax([0, 2])).sqrt()
    torch.testing.assert_close(program.weights["c"] / old.weights["c"], factors[:, None].expand(4, 4, 1))
