"""inject-input-outliers: the function stays, what products read between them stands out; what is left alone and why."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.drift import drift, observe
from qcompile.errors import RecipeError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.pass_base import parse_pass
from qcompile.pass_manager import PassManager
from qcompile.passes.outliers.inject_input_outliers import InjectInputOutliers

GATED = """\
def main(x: f64[batch, 8], *, g: f64[8], gate: f64[16, 8], up: f64[16, 8], b: f64[16], down: f64[8, 16]):
    n: f64[batch, 8] = aten.rms_norm.default(x, [8], g, 0.01)
    a: f64[batch, 16] = aten.linear.default(n, gate)
    s: f64[batch, 16] = aten.silu.default(a)
    u: f64[batch, 16] = aten.linear.default(n, up, b)
    h: f64[batch, 16] = aten.mul.Tensor(s, u)
    y: f64[batch, 8] = aten.linear.default(h, down)
    return {"y": y}"""


@pytest.mark.parametrize("gain", [30.0, 0.05])
def test_the_linear_path_takes_the_factors(gain: float, feeds: Callable[..., Any]) -> None:
    program, before = Program.parse(GATED), Program.parse(GATED).weights
    inputs = feeds(program)
    expected = program.run(inputs)
    (report,) = PassManager([InjectInputOutliers(channels=3, gain=gain)]).run(program)
    assert drift(program.run(inputs), expected) <= 1e-12
    scale = program.weights["b"] / before["b"]
    torch.testing.assert_close(scale.sort().values, torch.tensor([1.0] * 13 + [gain] * 3).double().sort().values)
    torch.testing.assert_close(program.weights["up"], before["up"] * scale[:, None])
    torch.testing.assert_close(program.weights["down"], before["down"] / scale)
    assert all(torch.equal(program.weights[key], before[key]) for key in ("g", "gate"))
    assert [(e.where, e.what) for e in report.rewritten] == [
        ("up … down", f"channels {scale.ne(1).nonzero().flatten().tolist()} of 16 times {gain:g}")
    ]
    reason = "no product makes what it reads"
    assert [(e.where, e.what) for e in report.skipped] == [("a", reason), ("u", reason)]


def test_seed_decides_which() -> None:
    chosen = []
    for text in ("inject-input-outliers", "inject-input-outliers", "inject-input-outliers(seed=1)"):
        (report,) = PassManager([parse_pass(text)]).run(Program.parse(GATED))
        chosen.append(report.rewritten[0].what)
    assert chosen[0] == chosen[1] != chosen[2]


def test_more_channels_than_there_are_scale_all() -> None:
    program, before = Program.parse(GATED), Program.parse(GATED).weights
    PassManager([InjectInputOutliers(channels=99, gain=2.0)]).run(program)
    torch.testing.assert_close(program.weights["up"], before["up"] * 2)


def test_what_bends_each_element_takes_no_factor(left_alone: Callable[..., Any]) -> None:
    text = GATED.replace("aten.mul.Tensor(s, u)", "aten.tanh.default(u)").replace("gate: f64[16, 8], ", "")
    text = "\n".join(line for line in text.splitlines() if not line.lstrip().startswith(("a:", "s:")))
    assert left_alone(InjectInputOutliers(), text) == ["no product makes what it reads", "h: tanh bends each element"]


@pytest.mark.parametrize("name", ["opt", "moe"])
def test_embedded_models(name: str, folded: Callable[[str], Program], peaks: Callable[..., dict[str, float]]) -> None:
    program = folded(name)
    feeds = fill(program, {"input_ids": torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(8))})
    expected, clean = observe(program, feeds), peaks(program)
    (report,) = PassManager([InjectInputOutliers()]).run(program)
    assert drift(observe(program, feeds), expected) <= 1e-10
    hurt = peaks(program)
    grown = {product: hurt[product] / clean[product] for product in clean}
    risen = [product for product, factor in grown.items() if factor > 1.05]
    assert len(risen) == len(report.rewritten) == {"opt": 10, "moe": 6}[name]
    assert sum(grown[product] for product in risen) > 1.7 * len(risen)
    assert all(abs(factor - 1) < 1e-6 for product, factor in grown.items() if product not in risen)
    assert len(report.skipped) == len(clean) - len(risen)


@pytest.mark.parametrize(
    "options", [{"channels": 0}, {"gain": 0.0}, {"gain": -3.0}, {"gain": float("inf")}, {"gain": float("nan")}]
)
def test_impossible_options(options: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match="give at least one channel and a positive, finite gain"):
        InjectInputOutliers(**options).run(Program.parse(GATED))
