"""InjectOutliers: the function stays, the activations don't; every reason to leave a norm alone."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.drift import drift
from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.pass_base import parse_pass
from qcompile.pass_manager import PassManager
from qcompile.passes.norm.raise_norms import RaiseNorms
from qcompile.passes.outliers.inject_outliers import InjectOutliers

aten = torch.ops.aten

# A linear, an addmm with a [K, N] weight, a stack of experts by bmm, one expert by select, and a router.
EVERY_READER = """\
    def main(
        x: f64[batch, 4, 8],
        *, g: f64[8], b: f64[8], w: f64[6, 8], c: f64[5], v: f64[8, 5], e: f64[3, 8, 7], r: f64[3, 8]
    ):
        n = aten.layer_norm.default(x, [8], g, b, 0.1)
        y1 = aten.linear.default(n, w)
        f = aten.view.default(n, [-1, 8])
        y2 = aten.addmm.default(c, f, v)
        u = aten.unsqueeze.default(f, 0)
        s = aten.expand.default(u, [3, -1, -1])
        y3 = aten.bmm.default(s, e)
        one = aten.select.int(e, 0, 1)
        y4 = aten.mm.default(f, one)
        y5 = aten.linear.default(f, r)
        return {"y1": y1, "y2": y2, "y3": y3, "y4": y4, "y5": y5}"""


def _parse(text: str) -> Program:
    return Program.parse(textwrap.dedent(text))


@pytest.mark.parametrize("gain", [30.0, -7.5, 0.01])
def test_every_kind_of_reader_keeps_the_function(gain: float, feeds: Callable[..., Any]) -> None:
    program = _parse(EVERY_READER)
    inputs = feeds(program)
    before, text = program.run(inputs), str(program)
    (report,) = PassManager([InjectOutliers(channels=2, gain=gain)]).run(program)
    assert [e.where for e in report.rewritten] == ["n"]
    assert report.rewritten[0].what.endswith("read by 4 weights")
    assert str(program) == text  # only weights changed
    assert drift(program.run(inputs), before) <= 1e-12
    scale = program.weights["g"] / _parse(EVERY_READER).weights["g"]
    torch.testing.assert_close(scale.sort().values, torch.tensor([1.0] * 6 + [gain] * 2).double().sort().values)


def test_activations_really_grow(feeds: Callable[..., Any]) -> None:
    program = _parse(EVERY_READER.replace('return {"y1"', 'a = aten.abs.default(y1)\n        return {"a": a, "y1"'))
    inputs = feeds(program)

    def normed(p: Program) -> Tensor:
        (norm,) = p.calls(aten.layer_norm.default)
        g, b = p.weights["g"], p.weights["b"]
        return torch.nn.functional.layer_norm(inputs["x"], [8], g, b, p.arg(norm, "eps"))

    before = normed(program)
    PassManager([InjectOutliers(channels=1, gain=50.0)]).run(program)
    after = normed(program)
    assert after.abs().max() > 10 * before.abs().max()
    assert _kurtosis(after) > 2 * _kurtosis(before)


def _kurtosis(x: Tensor) -> Tensor:
    x = x - x.mean()
    return x.pow(4).mean() / x.square().mean().square()


def test_seed_and_channels_decide_which() -> None:
    chosen = {}
    for seed in (0, 0, 1):
        program = _parse(EVERY_READER)
        (report,) = PassManager([parse_pass(f"inject-outliers(channels=3, seed={seed})")]).run(program)
        chosen.setdefault(seed, set()).add(report.rewritten[0].what)
        assert (program.weights["g"] != _parse(EVERY_READER).weights["g"]).sum() == 3
    assert len(chosen[0]) == 1
    assert chosen[0] != chosen[1]


SIMPLE = """\
    def main(x: f64[batch, 8], *, g: f64[8], w: f64[6, 8], t: f64[8, 8]):
        n: f64[batch, 8] = aten.rms_norm.default(x, [8], g, 0.1)
        y: f64[batch, 6] = aten.linear.default(n, w)
        z: f64[batch, 8] = aten.linear.default(x, t)
        return {"y": y, "z": z}"""

LEFT_ALONE = {
    "residual": (
        {"return": "a: f64[batch, 8] = aten.add.Tensor(x, n)\n        return", '"z": z': '"z": z, "a": a'},
        "it is read by a (aten.add.Tensor), which is no multiplication with a weight",
    ),
    "returned": (
        {'"z": z': '"z": z, "n": n'},
        "it is read by output (output), which is no multiplication with a weight",
    ),
    "computed gain": (
        {"n: f64": "o: f64[8] = aten.add.Tensor(g, 1)\n        n: f64", "[8], g,": "[8], o,"},
        "its weight is computed, so no gain can be scaled",
    ),
    "shared gain": (
        {"aten.linear.default(x, t)": "aten.mul.Tensor(x, g)", ", t: f64[8, 8]": ""},
        "its weight 'g' is shared with z",
    ),
    "weight read elsewhere": (
        {
            "aten.linear.default(x, t)": "aten.linear.default(x, w)",
            ", t: f64[8, 8]": "",
            "z: f64[batch, 8]": "z: f64[batch, 6]",
        },
        "weight 'w' is also read by z",
    ),
    "tied embedding": (
        {
            "x: f64[batch, 8]": "x: f64[batch, 8], i: i64[batch]",
            "aten.linear.default(x, t)": "aten.embedding.default(w, i)",
            ", t: f64[8, 8]": "",
        },
        "weight 'w' is also read by z",
    ),
    "rows, not columns": (
        {
            "y: f64[batch, 6] = aten.linear.default(n, w)": "y: f64[6, 8] = aten.mm.default(w, n)",
            "w: f64[6, 8]": "w: f64[6, 5]",
            "batch": "5",
        },
        "it is read by y (aten.mm.default), which is no multiplication with a weight",
    ),
    "two activations": (
        {
            "aten.linear.default(n, w)": "aten.linear.default(n, z)",
            "y: f64[batch, 6]": "y: f64[batch, batch]",
            "w: f64[6, 8], ": "",
            "        z: f64[batch, 8] = aten.linear.default(x, t)\n": "",
            "        n: f64": "        z: f64[batch, 8] = aten.linear.default(x, t)\n        n: f64",
        },
        "it is read by y (aten.linear.default), which is no multiplication with a weight",
    ),
    "two axes": (
        {"x: f64[batch, 8]": "x: f64[5, 8]", "batch": "5", "[8], g": "[5, 8], g", "g: f64[8]": "g: f64[5, 8]"},
        "it normalises more than one axis",
    ),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str, left_alone: Callable[..., Any]) -> None:
    changes, reason = LEFT_ALONE[name]
    text = SIMPLE
    for old, new in changes.items():
        assert old in text
        text = text.replace(old, new)
    assert left_alone(InjectOutliers(), text) == [reason]


def test_norms_without_gains_get_some(feeds: Callable[..., Any]) -> None:
    program = _parse("""\
        def main(x: f64[batch, 8], *, b: f64[8], w: f64[8, 8], v: f64[6, 8]):
            n: f64[batch, 8] = aten.layer_norm.default(x, [8], None, b, 0.1)  # norm
            y: f64[batch, 8] = aten.linear.default(n, w)
            m: f64[batch, 8] = aten.rms_norm.default(y, [8], None, 0.1)  # norm
            z: f64[batch, 6] = aten.linear.default(m, v)
            return {"z": z}""")
    inputs = feeds(program)
    before = program.run(inputs)
    PassManager([InjectOutliers(channels=2, gain=20.0)]).run(program)
    assert drift(program.run(inputs), before) <= 1e-12
    gains = [program.weights[key] for key in ("norm.outliers", "norm.outliers.m")]  # the module runs twice
    assert all(gain.sort().values.tolist() == [1.0] * 6 + [20.0] * 2 for gain in gains)


def test_a_weight_used_along_both_axes_is_left_alone(left_alone: Callable[..., Any]) -> None:
    text = """\
        def main(x: f64[batch, 8], *, g: f64[8], w: f64[8, 8]):
            n: f64[batch, 8] = aten.rms_norm.default(x, [8], g, 0.1)
            y: f64[batch, 8] = aten.linear.default(n, w)
            z: f64[batch, 8] = aten.mm.default(n, w)
            return {"y": y, "z": z}"""
    assert left_alone(InjectOutliers(), text) == ["weight 'w' is contracted over two different axes"]


def test_a_quantized_weight_is_left_alone(left_alone: Callable[..., Any]) -> None:
    text = """\
        def main(x: f32[batch, 8], *, g: f32[8], w: f32[6, 8]):
            n: f32[batch, 8] = aten.rms_norm.default(x, [8], g, 0.1)
            p: tuple[f32[6, 1], f32[0]] = qcompile.choose_qparams.default(w, "int4 sym channel")
            s: f32[6, 1] = operator.getitem(p, 0)
            q: i8[6, 8] = qcompile.quantize.default(w, s, None, "int4 sym channel")
            d: f32[6, 8] = qcompile.dequantize.default(q, s, None, "int4 sym channel")
            y: f32[batch, 6] = aten.linear.default(n, d)
            return {"y": y}"""
    (reason,) = left_alone(InjectOutliers(), text)
    assert reason == "weight 'w' is quantized already (q)"


@pytest.mark.parametrize("options", [{"channels": 0}, {"gain": 0.0}, {"gain": float("inf")}, {"gain": float("nan")}])
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="give at least one channel and a finite gain"):
        InjectOutliers(**options).run(_parse(SIMPLE))


def test_a_whole_decoder(tiny_decoder: Callable[..., Any]) -> None:
    _, program = tiny_decoder("llama")
    ids = {"input_ids": torch.randint(0, 64, (2, 7))}
    (raised, injected) = PassManager([RaiseNorms(), InjectOutliers(gain=30)]).run(program)
    assert len(injected.rewritten) == len(raised.rewritten) == 3  # two in the layer, and the last
    _, original = tiny_decoder("llama")
    assert drift(program.run(ids), original.run(ids)) <= 1e-5  # float32
