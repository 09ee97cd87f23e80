"""PassManager: order, verification, instruments, and the bisection that finds a bad pass."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from torch import Tensor

from qcompile.drift import Bisection, Drift, bisect, drift
from qcompile.errors import QCompileError, VerifyError
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Pass, Report
from qcompile.pass_manager import Dumps, OpCounts, PassManager, PrintChanged

aten = torch.ops.aten

TEXT = """\
def main(x: f32[2, 4], *, w: f32[4, 4], u: f32[4]):
    y: f32[2, 4] = aten.linear.default(x, w)
    z: f32[2, 4] = aten.add.Tensor(y, u)
    return {"z": z}"""


@dataclass(frozen=True)
class DoubleNegate(Pass):
    """Exact, and grows the graph."""

    name: ClassVar[str] = "double-negate"

    def run(self, program: Program) -> Report:
        report = Report()
        (linear,) = program.calls(aten.linear.default)
        first = program.call(aten.neg.default, (program.arg(linear, "input"),), before=linear)
        program.set_arg(linear, "input", program.call(aten.neg.default, (first,), before=linear))
        report.rewrote(linear)
        return report


@dataclass(frozen=True)
class Spoil(Pass):
    name: ClassVar[str] = "spoil"
    by: float = 2.0

    def run(self, program: Program) -> Report:
        program.weights.edit("w", lambda w: w * self.by)
        return Report()


@dataclass(frozen=True)
class Rounds(Spoil):
    name: ClassVar[str] = "rounds"
    preserves_function: ClassVar[bool] = False


@dataclass(frozen=True)
class Breaks(Pass):
    name: ClassVar[str] = "breaks"

    def run(self, program: Program) -> Report:
        del program.weights["w"]
        return Report()


@dataclass(frozen=True)
class Counts(CalibratedPass):
    name: ClassVar[str] = "counts"

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        report = Report()
        report.note(f"{sum(1 for _ in batches)} batches")
        return report


@pytest.fixture
def program() -> Program:
    return Program.parse(TEXT)


FEEDS = {"x": torch.arange(8.0).view(2, 4)}


def test_runs_in_order_and_reports(program: Program) -> None:
    reports = PassManager([DoubleNegate(), Spoil(by=3.0)]).run(program)
    assert [r.pass_name for r in reports] == ["double-negate", "spoil(by=3.0)"]
    assert all(r.seconds > 0 for r in reports)
    assert reports[0].rewritten[0].where == "y"


@pytest.mark.parametrize("count", [0, 1, 2, 3])
def test_stops_after(program: Program, count: int) -> None:
    reports = PassManager([DoubleNegate()] * 3, stop_after=count).run(program)
    assert len(reports) == count
    assert len(program.calls(aten.neg.default)) == 2 * count


def test_an_error_says_which_pass_and_what_came_before(program: Program) -> None:
    with pytest.raises(VerifyError, match="rule 'bound'") as caught:
        PassManager([DoubleNegate(), Breaks(), DoubleNegate()]).run(program)
    assert caught.value.__notes__ == ["while running pass 2 of 3, breaks (before it: double-negate)"]


def test_calibrated_passes_get_batches(program: Program) -> None:
    (report,) = PassManager([Counts()], batches=[torch.ones(1, 2)] * 3).run(program)
    assert report.notes == ["3 batches"]
    with pytest.raises(QCompileError, match="pass 'counts' needs calibration data and none is given; give data="):
        PassManager([Counts()]).run(program)


def test_dumps(program: Program, tmp_path: Path) -> None:
    PassManager([DoubleNegate(), Spoil()], [Dumps(tmp_path / "dumps")]).run(program)
    files = sorted((tmp_path / "dumps").iterdir())
    assert [f.name for f in files] == ["00_input.qir", "01_double-negate.qir", "02_spoil.qir"]
    assert files[0].read_text() == TEXT + "\n"
    assert str(Program.parse(files[2].read_text())) == str(program)


def test_print_changed(program: Program, capsys: pytest.CaptureFixture[str]) -> None:
    PassManager([Spoil(), DoubleNegate()], [PrintChanged()]).run(program)
    printed = capsys.readouterr().out
    assert printed.startswith("# spoil changed nothing\n\n# after double-negate\ndef main(")
    assert str(program) in printed


def test_op_counts(program: Program) -> None:
    reports = PassManager([DoubleNegate(), Spoil()], [OpCounts()]).run(program)
    assert reports[0].notes == ["operators: aten.neg.default +2"]
    assert reports[1].notes == ["operators: unchanged"]


def test_drift_is_that_of_each_pass(program: Program) -> None:
    before = program.run(FEEDS)
    reports = PassManager([DoubleNegate(), Rounds(by=2.0), DoubleNegate()], [Drift(FEEDS, tolerance=1e-6)]).run(program)
    assert [r.drift == 0 for r in reports] == [True, False, True]
    assert reports[1].drift == pytest.approx(drift(program.run(FEEDS), before))


def test_drift_refuses_a_pass_that_breaks_its_promise(program: Program) -> None:
    with pytest.raises(QCompileError, match=r"pass spoil changed the function: outputs moved by .* find the culprit"):
        PassManager([DoubleNegate(), Spoil()], [Drift(FEEDS, tolerance=1e-6)]).run(program)


CACHED = """\
def main(input_ids: i64[batch, sequence], past_key_values_0_key: f32[batch, 1, past, 4], *, e: f32[9, 4]):
    x = aten.embedding.default(e, input_ids)
    n = aten.unsqueeze.default(x, 1)
    k = aten.cat.default([past_key_values_0_key, n], 2)
    y = aten.sum.dim_IntList(k, [2])
    return {"logits": y, "present_0_key": k}"""


def test_drift_goes_on_where_a_pass_changed_the_inputs() -> None:
    from qcompile.ir.run import fill
    from qcompile.passes.cleanup.drop_identities import DropIdentities
    from qcompile.passes.quantize.kv_cache import QuantizeKVCache

    program = Program.parse(CACHED)
    feeds = fill(program, {"input_ids": torch.arange(6).view(2, 3)})
    passes = [DropIdentities(), QuantizeKVCache(keys="int8 sym token dynamic"), DropIdentities()]
    assert bisect(program, passes, feeds, 0.5) is None
    reports = PassManager(passes, [Drift(feeds)]).run(program)
    assert "past_key_values_0_key_scale" in {node.name for node in program.inputs}
    assert [report.drift for report in reports][::2] == [0.0, 0.0]
    assert reports[1].drift is not None
    assert 0 < reports[1].drift < 0.01  # of the logits; what the cache holds is codes now


def test_drift_measures() -> None:
    one, ints = torch.tensor([4.0, -8.0]), torch.tensor([1, 2])
    assert drift({"a": one, "i": ints}, {"a": one, "i": ints + 1}) == 0  # integers are not compared
    assert drift({"a": one + 1}, {"a": one}) == 1 / 8
    assert drift({"a": one[:1]}, {"a": one}) == float("inf")
    assert drift({}, {"a": one}) == float("inf")
    assert drift({"a": one * float("nan")}, {"a": one}) == float("inf")
    assert drift({"a": one[:0]}, {"a": one[:0]}) == 0


@pytest.mark.parametrize("culprit", [0, 1, 7, 18, 19])
def test_bisect_finds_the_seeded_bad_pass(program: Program, culprit: int) -> None:
    passes: list[Pass] = [DoubleNegate() for _ in range(20)]
    passes[culprit] = Spoil(by=1.01)
    text = str(program)
    found = bisect(program, passes, FEEDS, tolerance=1e-4)
    assert isinstance(found, Bisection)
    assert (found.index, found.pass_) == (culprit, Spoil(by=1.01))
    assert found.drift > 1e-4
    assert str(program) == text  # worked on copies


def test_bisect_takes_few_runs(program: Program, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []
    original = PassManager.run
    monkeypatch.setattr(PassManager, "run", lambda self, p: (runs.append(1), original(self, p))[1])
    passes: list[Pass] = [DoubleNegate() for _ in range(32)]
    passes[11] = Spoil()
    assert bisect(program, passes, FEEDS, tolerance=1e-4) is not None
    assert len(runs) <= 6


def test_bisect_finds_nothing_where_nothing_is_wrong(program: Program) -> None:
    assert bisect(program, [DoubleNegate(), Spoil(by=1.0)], FEEDS, tolerance=1e-6) is None
    assert bisect(program, [], FEEDS, tolerance=1e-6) is None
