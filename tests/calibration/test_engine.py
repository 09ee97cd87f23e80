"""The engine gives what rounding weight by weight gives, where the whole program is run for every one of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from calibration import tiny
from torch import Tensor

from qcompile import run_passes
from qcompile.calibration.engine import Engine
from qcompile.calibration.processes import Processes
from qcompile.calibration.settings import Settings
from qcompile.calibration.worker import Setup
from qcompile.errors import QCompileError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import run
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report
from qcompile.passes.quantize.plain import without_rounding
from qcompile.passes.round.gptq import Gptq
from qcompile.passes.round.matrices import statistics
from qcompile.passes.round.rounding import RoundingWorker
from qcompile.rounding import GPTQ, FloatTarget, Statistics, Stored, round_matrix

MARK = "insert-qdq(weights=int3 sym group=8)"
STATIC = "insert-qdq(weights=int3 sym group=8, activations=int8 asym tensor static), calibrate"
METHODS = {"gptq": GPTQ(0.01, "act"), "gptq(target=float)": FloatTarget(0.01, "act")}


def marked(layers: int = 2, passes: str = MARK) -> Program:
    program = tiny.decoder(layers)
    run_passes(program, passes, tiny.tokens())
    return program


def rounded(passes: str, settings: Settings | None = None, start: str = MARK) -> tuple[Program, Report]:
    program = marked(passes=start)
    return program, run_passes(program, passes, tiny.tokens(), settings=settings)[-1]


def named(batches: list[Tensor]) -> list[dict[str, Tensor]]:
    return [{"input_ids": ids} for ids in batches]


@pytest.mark.parametrize("start", [MARK, STATIC])
@pytest.mark.parametrize("passes", METHODS)
def test_codes_are_those_of_the_slow_way(passes: str, start: str) -> None:
    program, _ = rounded(passes, start=start)
    slow = marked(passes=start)
    tiny.slowly(slow, named(tiny.tokens()), METHODS[passes])
    assert tiny.same(tiny.codes(program), tiny.codes(slow))
    other = marked(passes=start)
    tiny.slowly(other, named(tiny.tokens()), GPTQ(0.01, "act"), propagate="float")
    assert not tiny.same(tiny.codes(program), tiny.codes(other))  # what is propagated decides codes here


def test_propagate_float() -> None:
    program, report = rounded("gptq", tiny.FLOAT)
    slow = marked()
    tiny.slowly(slow, named(tiny.tokens()), GPTQ(0.01, "act"), propagate="float")
    assert tiny.same(tiny.codes(program), tiny.codes(slow))
    program, report = rounded("gptq(target=float)", tiny.FLOAT)
    assert tiny.same(tiny.codes(program), tiny.codes(slow))
    assert any("is plain GPTQ" in note for note in report.notes)


def test_a_segment_at_once() -> None:
    """Products of one segment are looked at before any of them is rounded by the method."""
    program, report = rounded("gptq", tiny.TOGETHER)
    slow = marked()
    groups = [[f"w{n}{names[-1]}" for n in names[:-1]] for names in ("qkvo0", "tud0", "qkvo1", "tu1", "d1")]
    tiny.slowly(slow, named(tiny.tokens()), GPTQ(0.01, "act"), together=groups)
    assert tiny.same(tiny.codes(program), tiny.codes(slow))
    assert not tiny.same(tiny.codes(program), tiny.codes(rounded("gptq")[0]))
    assert report.measured["calibration"]["stages"] == report.measured["calibration"]["segments"] == 5


def test_files_in_place_of_memory_change_nothing() -> None:
    one, _ = rounded("gptq(target=float)")
    other, report = rounded("gptq(target=float)", tiny.SPILLED)
    assert tiny.same(tiny.codes(one), tiny.codes(other))
    assert any("between stages went through files" in note for note in report.notes)


def test_with_static_activations_one_run_is_two() -> None:
    """Scales and codes from passes that share a run are those of passes that run one after the other."""
    program = tiny.decoder(2)
    start, calibrate = STATIC.rsplit(", ", 1)
    reports = run_passes(program, f"{start}, {calibrate}, gptq", tiny.tokens())
    other, _ = rounded("gptq", start=STATIC)
    assert tiny.same(tiny.codes(program), tiny.codes(other))
    assert "calibration" in reports[1].measured
    assert "calibration" not in reports[2].measured


def test_padding_is_as_documents_one_by_one() -> None:
    lengths = [6, 2, 4, 5, 1, 3]
    documents = [tiny.tokens(1, n, 1, seed)[0] for seed, n in enumerate(lengths)]
    mask = torch.stack([torch.arange(6) < n for n in lengths]).long()
    ids = torch.stack([torch.cat([d[0], d.new_full((6 - d.shape[1],), 7)]) for d in documents])
    padded = [{"input_ids": ids[:4], "attention_mask": mask[:4]}, {"input_ids": ids[4:], "attention_mask": mask[4:]}]
    one, other, wrong = marked(), marked(), marked()
    (report,) = run_passes(one, "gptq(target=float)", padded)
    run_passes(other, "gptq(target=float)", documents)
    run_passes(wrong, "gptq(target=float)", [ids])
    assert tiny.same(tiny.codes(one), tiny.codes(other))
    assert not tiny.same(tiny.codes(one), tiny.codes(wrong))
    assert report.measured["wq0"]["tokens"] == sum(lengths)
    assert any("6 samples, 21 tokens" in note for note in report.notes)


@pytest.mark.parametrize("padding", [False, True])
def test_nan_names_the_place_and_the_sample(padding: bool) -> None:
    """Token 31 is nan in the embedding; it comes in the third sample of the second batch."""
    program = marked()
    table = program.weights["e"].clone()
    table[31, 5] = float("nan")
    program.weights["e"] = table
    ids = torch.arange(30).view(5, 6)
    batches: list[Any] = [ids, ids.clone()]
    batches[1][2, 3] = 31
    if padding:
        mask = torch.ones(5, 6, dtype=torch.int64)
        mask[0, 1:] = mask[1, 2:] = 0
        batches[1] = {"input_ids": batches[1], "attention_mask": mask}
    with pytest.raises(QCompileError) as caught:
        run_passes(program, "gptq", batches)
    assert (
        str(caught.value) == "the input of 0.q is nan or infinite in calibration sample 7; mend the model or the data"
    )


def test_data_without_tokens() -> None:
    with pytest.raises(QCompileError, match="the calibration data has no tokens; give data= with at least one batch"):
        run_passes(marked(), "gptq", [])


SHARED = """def main(x: f64[batch, 8], *, v: f64[8, 8], w: f64[8, 8]):
    z = aten.linear.default(x, v)  # in
    a = aten.linear.default(z, w)  # a
    r = aten.relu.default(a)
    y = aten.linear.default(r, w)  # b
    return {"y": y}"""
SIDE_BY_SIDE = """def main(x: f64[batch, 8], *, v: f64[8, 8], w: f64[8, 8]):
    z = aten.linear.default(x, v)  # in
    r = aten.relu.default(z)
    a = aten.linear.default(r, w)  # a
    b = aten.linear.default(z, w)  # b
    s = aten.mul.Tensor(z, r)
    c = aten.linear.default(s, w)  # c, in the next segment
    d = aten.add.Tensor(a, b)
    y = aten.add.Tensor(c, d)
    return {"y": y}"""


@pytest.mark.parametrize(("text", "together"), [(SHARED, False), (SIDE_BY_SIDE, True)])
def test_a_weight_that_two_products_read(text: str, together: bool) -> None:
    """Rounded where it is first read; the inputs of readers there are summed."""
    generator = torch.Generator().manual_seed(1)
    batches = [{"x": torch.randn(20, 8, generator=generator, dtype=torch.float64)} for _ in range(3)]
    program = Program.parse(text)
    run_passes(program, "insert-qdq(weights=int3 sym channel)")
    weight = program.weights["w"]
    (report,) = run_passes(program, "gptq", batches)
    z = torch.cat([b["x"] for b in batches]) @ decoded(program, "v").t()
    rows = torch.cat([z.relu(), z]) if together else z
    stored = Stored(QuantSpec.parse("int3 sym channel"), (8, 8), 0, 1)
    expected = round_matrix(weight, stored, sums(rows), GPTQ(0.01, "act")).result
    assert torch.equal(program.weights["w.codes"], expected.codes)
    assert report.measured["w"]["tokens"] == len(rows)


def decoded(program: Program, key: str) -> Tensor:
    return program.weights[f"{key}.codes"].double() * program.weights[f"{key}.scale"].double()


def sums(rows: Tensor) -> Statistics:
    return Statistics(rows.t() @ rows, tokens=len(rows))


EXPERTS = """def main(x: f64[n, 8], i: i64[n], *, w0: f64[8, 8], w: f64[3, 6, 8] = 'experts.w'):
    z = aten.linear.default(x, w0)  # in
    g = aten.index.Tensor(w, [i])
    u = aten.unsqueeze.default(z, -1)
    b = aten.bmm.default(g, u)  # experts
    return {'y': b}"""


def expert_batches(shares: tuple[float, float, float]) -> list[dict[str, Tensor]]:
    """Rows of which expert e gets a part."""
    generator = torch.Generator().manual_seed(2)
    odds = torch.tensor(shares, dtype=torch.float64)
    found = []
    for _ in range(3):
        x = torch.randn(60, 8, generator=generator, dtype=torch.float64)
        found.append({"x": x, "i": torch.multinomial(odds, 60, replacement=True, generator=generator)})
    return found


def test_experts_see_the_rows_that_are_dealt_to_them() -> None:
    """Each is rounded by its own rows, and the one with few by all rows, which the report says."""
    batches = expert_batches((0.6, 0.37, 0.03))
    program = Program.parse(EXPERTS)
    run_passes(program, "insert-qdq(weights=int3 sym channel)")
    experts = program.weights["experts.w"]
    (report,) = run_passes(program, "gptq", batches)
    rows = torch.cat([b["x"] for b in batches]) @ decoded(program, "w0").t()
    owner = torch.cat([b["i"] for b in batches])
    counts = owner.bincount(minlength=3)
    assert counts[2] < 16 < counts[1]
    stored = Stored(QuantSpec.parse("int3 sym channel axis=1"), (1, 6, 8), 1, 2)
    for e in range(3):
        mine = rows if e == 2 else rows[owner == e]
        expected = round_matrix(experts[e], stored, sums(mine), GPTQ(0.01, "act")).result
        assert torch.equal(program.weights["experts.w.codes"][e], expected.codes[0]), e
    told = f"experts that saw too few tokens are rounded by what all saw: expert (tokens) 2 ({int(counts[2])})"
    assert f"experts.w: {told}" in report.notes
    assert report.measured["experts.w"]["tokens"] == 180 - counts[2] + 180


def test_hessians_of_experts() -> None:
    """What the engine collects for each expert, before anything is rounded."""
    batches = expert_batches((0.5, 0.5, 0.0))
    program = Program.parse(EXPERTS)
    run_passes(program, "insert-qdq(weights=int3 sym channel)")
    setup = Setup(program, without_rounding(program), tiny.FLOAT)
    worker = Gptq().begin(setup)
    assert isinstance(worker, RoundingWorker)
    engine = Engine(setup, [worker], batches, Processes())
    last = engine.chain.stages[-1]
    want = next(w for w in worker.wants(last) if getattr(w, "experts", None) is not None)
    for stage in engine.chain.stages[:-1]:
        engine._advance(stage)
    found: Any = engine._collect(last, [want])[want]
    x, owner = torch.cat([b["x"] for b in batches]), torch.cat([b["i"] for b in batches])
    z = x @ program.weights["w0"].t()
    assert set(found.of) == {0, 1}
    for e, gram in found.of.items():
        mine = z[owner == e]
        assert gram.tokens == len(mine)
        torch.testing.assert_close(statistics(gram, 8).hessian, mine.t() @ mine, rtol=1e-12, atol=1e-12)


def test_nan_of_an_expert_names_it_and_the_samples() -> None:
    batches = expert_batches((0.5, 0.3, 0.2))
    program = Program.parse(
        EXPERTS.replace("aten.linear.default(x, w0)", "aten.div.Tensor(x, x)").replace("w0: f64[8, 8], ", "")
    )
    run_passes(program, "insert-qdq(weights=int3 sym channel)")
    batches[1]["x"][5] = 0
    expert = int(batches[1]["i"][5])
    with pytest.raises(QCompileError) as caught:
        run_passes(program, "gptq", batches)
    assert f"the input of experts, expert {expert} is nan or infinite in calibration samples 60-119" in str(
        caught.value
    )


def test_the_report_is_the_same_every_time() -> None:
    """But for seconds."""
    (one, first), (other, second) = rounded("gptq(target=float)"), rounded("gptq(target=float)")
    assert tiny.same(tiny.codes(one), tiny.codes(other))
    told = [report.notes for report in (first, second)]
    assert told[0] == told[1]
    assert [e.where for e in first.rewritten] == [e.where for e in second.rewritten]
    figures = first.measured["calibration"]
    assert (figures["segments"], figures["stages"], figures["processes"]) == (5, 8, 1)
    assert {"forward_seconds", "collect_seconds", "solve_seconds"} <= set(figures)
    assert any(note.startswith("14 places in 5 segments and 8 stages") for note in first.notes)


@pytest.mark.parametrize("made", [tiny.decoder, tiny.experts])
def test_what_is_run_on_is_what_comes_out(made: Callable[[], Program]) -> None:
    """The values at the last stage are those of the finished program: all that was rounded before has been seen."""
    program = made()
    run_passes(program, MARK)
    setup = Setup(program, without_rounding(program), Settings())
    worker = Gptq().begin(setup)
    engine = Engine(setup, [worker], named(tiny.tokens()), Processes())
    engine.run()
    assert engine.quantized is not None
    values = engine.quantized.values.get(0)
    worker.finish()
    seen: dict[str, Any] = {}
    run(program, named(tiny.tokens())[0], lambda node, value: seen.update({node.name: value}))
    assert set(values) == set(engine.chain.stages[-1].starts)
    for name, value in values.items():
        assert (value - seen[name]).abs().max() < 1e-12 * seen[name].abs().max()
    paths = {node.name for c in find_contractions(program) for node in c.path}
    assert not paths & {name for stage in engine.chain.stages for name in stage.starts}
