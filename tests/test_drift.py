"""Drift: a cache may be kept in another basis; what a pass does to anything else is seen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

import qcompile as qc
from qcompile import driver
from qcompile.cli.opt import run_bisect
from qcompile.drift import Drift, bisect, drift, observe
from qcompile.driver import check_feeds
from qcompile.errors import QCompileError
from qcompile.ir.edits import AlongAxis
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.ir.state import past_name, present_name, state_pairs
from qcompile.pass_base import PASSES, Pass, Report
from qcompile.pass_manager import PassManager

aten = torch.ops.aten

# Every token attends to the whole cache; the mask's length scales the result, so a mask that is cut wrongly is seen.
TEXT = """\
def main(
    input_ids: i64[batch, sequence],
    attention_mask: i64[batch, total],
    position_ids: i64[batch, sequence],
    past_key_values_0_key: f64[batch, 1, past, 4],
    past_key_values_0_value: f64[batch, 1, past, 4],
    *,
    e: f64[16, 4],
    p: f64[16, 4],
    k: f64[4, 4],
    v: f64[4, 4],
    o: f64[4, 4],
    head: f64[16, 4],
):
    words = aten.embedding.default(e, input_ids)
    places = aten.embedding.default(p, position_ids)
    x = aten.add.Tensor(words, places)
    heads = aten.unsqueeze.default(x, 1)
    new_keys = aten.linear.default(heads, k)
    new_values = aten.linear.default(heads, v)
    keys = aten.cat.default([past_key_values_0_key, new_keys], 2)
    values = aten.cat.default([past_key_values_0_value, new_values], 2)
    flipped = aten.transpose.int(keys, 2, 3)
    scores = aten.matmul.default(heads, flipped)
    told = aten.sum.dim_IntList(attention_mask, [1], True)
    per_row = aten.view.default(told, [-1, 1, 1, 1])
    scaled = aten.div.Tensor(scores, per_row)
    shares = aten.softmax.int(scaled, -1)
    mixed = aten.matmul.default(shares, values)
    out = aten.linear.default(mixed, o)
    flat = aten.squeeze.dim(out, 1)
    y = aten.add.Tensor(x, flat)
    logits = aten.linear.default(y, head)
    return {"logits": logits, "present_0_key": keys, "present_0_value": values}"""


def rotation(seed: int = 0) -> Tensor:
    return torch.linalg.qr(torch.randn(4, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))[0]


def edit(program: Program, key: str, axis: int, matrix: Tensor) -> None:
    node = program.weight_node(key)
    assert node is not None
    program.edit_weight(node, AlongAxis(axis, lambda w: w @ matrix.to(w.dtype).T))


@dataclass(frozen=True)
class RotateValues(Pass):
    """The cache holds values in another basis; the output projection takes it back."""

    name: ClassVar[str] = "rotate-values"
    seed: int = 0
    undo: bool = True

    def run(self, program: Program) -> Report:
        edit(program, "v", 0, rotation(self.seed))
        if self.undo:
            edit(program, "o", 1, rotation(self.seed))
        return Report()


@dataclass(frozen=True)
class RotateReturned(Pass):
    """Wrong: only what is returned is rotated, so one call is right and the next one reads nonsense."""

    name: ClassVar[str] = "rotate-returned"

    def run(self, program: Program) -> Report:
        (values,) = [n for n in program.nodes if n.name == "values"]
        matrix = program.add_weight("rotation", rotation())
        turned = program.call(aten.linear.default, (values, matrix), after=values)
        program.output_node.args = fx_swap(program, values, turned)
        return Report()


def fx_swap(program: Program, old: Any, new: Any) -> tuple[Any, ...]:
    return (tuple(new if value is old else value for value in program.outputs.values()),)


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


@pytest.fixture
def prompt(program: Program) -> dict[str, Tensor]:
    return fill(program, {"input_ids": torch.arange(14).view(2, 7)})


def test_state_pairs(program: Program) -> None:
    names = [(pair.past.name, pair.present) for pair in state_pairs(program)]
    assert names == [
        ("past_key_values_0_key", "present_0_key"),
        ("past_key_values_0_value", "present_0_value"),
    ]
    program.output_names = ("logits", "other", "present_0_value")
    assert [pair.present for pair in state_pairs(program)] == ["present_0_value"]
    assert past_name(present_name("past_key_values_0_key_scale")) == "past_key_values_0_key_scale"
    assert past_name("logits") is None


def test_the_second_part_goes_on_from_the_first(program: Program, prompt: dict[str, Tensor]) -> None:
    seen, ids = observe(program, prompt), prompt["input_ids"]
    assert list(seen) == ["logits", "logits (continued)"]
    assert torch.equal(seen["logits"], program(ids[:, :3]))
    for row in range(2):  # by hand: the tokens of the second part attend to all seven
        weights = {key: program.weights[key] for key in program.weights}
        x = weights["e"][ids[row]] + weights["p"][:7]
        shares = (x @ (x @ weights["k"].T).T / 7).softmax(-1)
        y = x + shares @ (x @ weights["v"].T) @ weights["o"].T
        assert torch.allclose(seen["logits (continued)"][row], (y @ weights["head"].T)[3:])


def test_padding_and_a_given_cache(program: Program, prompt: dict[str, Tensor]) -> None:
    padded = prompt | {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])}
    assert drift(observe(program, padded), observe(program, prompt)) > 1e-3
    past = {name: torch.randn(2, 1, 5, 4).double() for name in prompt if name.startswith("past")}
    given = prompt | past | {"attention_mask": torch.tensor([[0] * 5 + [1] * 7] * 2)}
    assert drift(observe(program, given), observe(program, prompt)) == 0


def test_a_rotated_cache_is_no_drift(program: Program, prompt: dict[str, Tensor]) -> None:
    before = program.run(prompt)
    reports = PassManager([RotateValues(1), RotateValues(2)], [Drift(prompt, 1e-10)]).run(program)
    assert all(report.drift is not None and report.drift < 1e-14 for report in reports)
    assert drift(program.run(prompt), before) > 0.1  # element by element, the cache is another


@pytest.mark.parametrize("wrong", [RotateReturned(), RotateValues(undo=False)])
def test_what_is_not_undone_is_caught(program: Program, prompt: dict[str, Tensor], wrong: Pass) -> None:
    with pytest.raises(QCompileError, match=f"pass {wrong.name}.* changed the function: .* qcompile bisect") as caught:
        PassManager([RotateValues(), wrong], [Drift(prompt, 1e-10)]).run(program)
    assert "rotate-values changed" not in str(caught.value)


def test_only_the_second_part_sees_a_wrong_cache(program: Program, prompt: dict[str, Tensor]) -> None:
    before = observe(program, prompt)
    PassManager([RotateReturned()]).run(program)
    now = observe(program, prompt)
    assert torch.equal(now["logits"], before["logits"])
    assert drift(now, before) > 1e-3


@pytest.mark.parametrize("culprit", [0, 3, 6])
def test_bisect_understands_states(program: Program, prompt: dict[str, Tensor], culprit: int) -> None:
    passes: list[Pass] = [RotateValues(seed) for seed in range(7)]
    assert bisect(program, passes, prompt, 1e-12) is None
    passes[culprit] = RotateReturned()
    found = bisect(program, passes, prompt, 1e-10)
    assert found is not None
    assert (found.index, found.pass_) == (culprit, RotateReturned())


def test_bisect_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for cls in (RotateValues, RotateReturned):
        monkeypatch.setitem(PASSES, cls.name, cls)
    (tmp_path / "p.qir").write_text(TEXT)
    run_bisect(
        str(tmp_path / "p.qir"), "rotate-values, rotate-values(seed=3), rotate-returned", 1e-8, None, [], as_json=True
    )
    assert json.loads(capsys.readouterr().out)["culprit"] == "rotate-returned"


def test_programs_that_take_one_length_run_once(prompt: dict[str, Tensor]) -> None:
    fixed = Program.parse(TEXT.replace("[batch, sequence]", "[batch, 7]"))
    assert list(observe(fixed, prompt)) == ["logits", "present_0_key", "present_0_value"]
    one = Program.parse(TEXT)
    assert len(observe(one, fill(one, {"input_ids": torch.ones(1, 1, dtype=torch.int64)}))) == 3


CHAIN = """\
def main(input_ids: i64[batch, sequence], *, e: f32[16, 4], w: f32[4, 4]):
    x = aten.embedding.default(e, input_ids)
    y = aten.linear.default(x, w)
    return {"logits": y}"""


@dataclass(frozen=True)
class Scale(Pass):
    name: ClassVar[str] = "scale"
    by: float = 1.0

    def run(self, program: Program) -> Report:
        program.weights.edit("w", lambda w: w * self.by)
        return Report()


@pytest.fixture
def compile_chain(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[Report]]:
    monkeypatch.setitem(PASSES, Scale.name, Scale)

    def compile(*factors: float, **recipe: str) -> list[Report]:
        passes = [f"scale(by={factor})" for factor in factors]
        return qc.compile(Program.parse(CHAIN), {"passes": passes, **recipe}).report.passes

    return compile


def test_small_models_are_checked_after_each_pass(compile_chain: Callable[..., list[Report]]) -> None:
    reports = compile_chain(1.0, 1.0)
    assert [report.drift for report in reports] == [0.0, 0.0]
    assert [report.drift for report in compile_chain(1.0, 1.0, verify="end")] == [None, 0.0]
    assert [report.drift for report in compile_chain(1.0, 1.01, verify="off")] == [None, None]
    assert not any(report.notes for report in reports)
    with pytest.raises(QCompileError, match=r"pass scale\(by=1.01\) changed the function: outputs moved by 1.00e-02"):
        compile_chain(1.0, 1.01, 1.0)


def test_large_models_are_checked_at_the_end(
    compile_chain: Callable[..., list[Report]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(driver, "CHECK_EACH_BELOW", 4 * (64 + 16) - 1)
    assert check_feeds(Program.parse(CHAIN))["input_ids"].shape == (1, 8)
    reports = compile_chain(1.0, 1.0)
    assert [report.drift for report in reports] == [None, 0.0]
    (note,) = reports[1].notes
    assert note.startswith(
        "scale, scale: compared on a prompt of 8 tokens, 0.0 GB of weights in float32 read each time"
    )
    assert [report.drift for report in compile_chain(1.0, 1.0, verify="each")] == [0.0, 0.0]
    message = r"one of passes scale\(by=1.01\), scale changed the function: .* qcompile bisect"
    with pytest.raises(QCompileError, match=message):
        compile_chain(1.01, 1.0)


@pytest.mark.parametrize(("factor", "caught"), [(1 + 5e-6, False), (1 + 2e-5, True)])
def test_tolerance_of_float32(compile_chain: Callable[..., list[Report]], factor: float, caught: bool) -> None:
    if caught:
        with pytest.raises(QCompileError, match="tolerance 1e-05"):
            compile_chain(factor)
    else:
        assert compile_chain(factor)[0].drift == pytest.approx(factor - 1, rel=0.1)


def test_the_coarsest_type_sets_the_tolerance() -> None:
    double = CHAIN.replace("f32", "f64")
    mixed = double.replace("linear.default(x, w)", "linear.default(x, w)\n    z = aten.to.dtype(y, torch.float32)")
    half = CHAIN.replace("f32", "bf16")
    tolerances = [driver._tolerance(Program.parse(text)) for text in (double, mixed.replace("y}", "z}"), CHAIN, half)]
    assert tolerances == [1e-10, 1e-5, 1e-5, 5e-2]
