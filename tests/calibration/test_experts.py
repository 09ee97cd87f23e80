"""Experts and the float stream: which rows of the float program each follows, and that following them pays."""

from __future__ import annotations

import pytest
import torch
from calibration import tiny
from torch import Tensor

from qcompile import run_passes
from qcompile.calibration.engine import Engine
from qcompile.calibration.inputs import InputGram, together
from qcompile.calibration.processes import Processes
from qcompile.calibration.settings import Settings
from qcompile.calibration.statistics import Collector, Gram, Want
from qcompile.calibration.worker import Setup
from qcompile.ir.program import Program
from qcompile.ir.run import run
from qcompile.passes.quantize.dealing import Dealing
from qcompile.passes.quantize.plain import without_rounding
from qcompile.passes.round.gptq import Gptq
from qcompile.passes.round.rounding import RoundingWorker

FEEDS = [{"input_ids": t} for t in tiny.tokens()]


def values(program: Program) -> dict[str, list[Tensor]]:
    """What each node computed, batch by batch."""
    found: dict[str, list[Tensor]] = {}
    for feeds in FEEDS:
        run(program, feeds, lambda node, value: found.setdefault(node.name, []).append(value))
    return found


@pytest.mark.parametrize(("stack", "x"), [("wu1", "c1"), ("wd1", "a1")])
def test_an_expert_follows_the_float_stream_where_both_programs_send_a_token_to_it(
    stack: str, x: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tiny.experts()
    run_passes(program, "insert-qdq(weights=int2 sym channel)")
    setup = Setup(program, without_rounding(program), Settings())
    worker = Gptq(target="float").begin(setup)
    assert isinstance(worker, RoundingWorker)
    engine = Engine(setup, [worker], FEEDS, Processes())
    (read,) = next(p for p in worker.places if p.key == stack).reads
    seen: dict[Want, Collector] = {}
    collect = engine._collect
    monkeypatch.setattr(engine, "_collect", lambda *given: seen.update(found := collect(*given)) or found)
    engine.run()
    worker.finish()
    found = seen[read.want]
    assert isinstance(found, InputGram)

    rounded, plain = values(program), values(setup.plain)
    if stack == "wu1":  # the router reads what it reads, and is rounded after both have been looked at
        router = setup.plain.weights["wr1"].t()
        rounded["f1"] = [(n @ router).argmax(-1).flatten() for n in rounded["n1"]]
    differing = total = 0
    for e in range(3):
        hessian, cross = torch.zeros(2, found.of[e].width, found.of[e].width, dtype=torch.float64)
        for batch in range(len(FEEDS)):
            owners = rounded["f1"][batch], plain["f1"][batch]
            for row, (mine, other) in enumerate(zip(*map(Tensor.tolist, owners), strict=True)):
                x_hat, x_float = (v[x][batch][row].flatten() for v in (rounded, plain))
                if mine != e:
                    continue
                total, differing = total + 1, differing + (other != e)
                hessian += torch.outer(x_hat, x_hat)
                cross += torch.outer(x_hat, x_float if other == e else x_hat)
        assert found.of[e].cross is not None
        torch.testing.assert_close(found.of[e].hessian, hessian, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(found.of[e].cross, cross, rtol=1e-10, atol=1e-10)
        assert not torch.allclose(cross, hessian)
    assert 0 < differing < total / 2  # both kinds of rows were there


def test_the_sum_over_experts_has_cross_terms_though_one_saw_nothing() -> None:
    """So that experts that saw little follow the float stream by what all saw."""
    some, other = Gram(), Gram()
    x = torch.randn(9, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    some.add(x[:5], 2 * x[:5])
    other.add(x[5:], 2 * x[5:])
    total = together([some, Gram(), other])
    assert total.cross is not None
    torch.testing.assert_close(total.cross, 2 * x.t() @ x)
    assert total.tokens == 9


def test_rows_of_a_stack_line_up_where_both_have_one() -> None:
    dealing = Dealing("stack", 2, 2)
    x = torch.tensor([[[1.0, 2], [0, 0], [3, 4]], [[0, 0], [5, 6], [7, 8]]])
    other = torch.tensor([[[9.0, 9], [8, 8], [0, 0]], [[7, 7], [6, 6], [0, 5]]])
    lined = dealing.lined_up(x, None, other, None)
    assert lined.tolist() == [[[9, 9], [0, 0], [3, 4]], [[0, 0], [6, 6], [0, 5]]]
    assert {e: r.tolist() for e, r in dealing.rows(lined, None).items()} == {0: [[9, 9], [3, 4]], 1: [[6, 6], [0, 5]]}


def test_rows_of_an_index_line_up_with_features_in_any_axis() -> None:
    dealing = Dealing("index", 3, 1, "i")
    x, other = torch.arange(8.0).view(4, 2, 1), -torch.arange(8.0).view(4, 2, 1)
    lined = dealing.lined_up(x, torch.tensor([0, 1, 2, 1]), other, torch.tensor([0, 2, 2, -2]))
    assert lined.flatten().tolist() == [0, -1, 2, 3, -4, -5, -6, -7]


@pytest.mark.parametrize("method", ["gptq(target=float)", "gptaq"])
def test_following_the_float_stream_pays_for_experts(method: str) -> None:
    """At three bits the logits are nearer to the float model's than with GPTQ, which does not."""
    wanted = [feeds["input_ids"] for feeds in FEEDS]
    errors = {}
    for text in ("gptq", method):
        program = tiny.experts()
        before = [program.run({"input_ids": t})["logits"] for t in wanted]
        (*_, report) = run_passes(program, f"insert-qdq(weights=int3 sym channel), {text}", tiny.tokens())
        assert all("gap" in f for key, f in report.measured.items() if key.startswith(("wu", "wd"))) == (text != "gptq")
        after = [program.run({"input_ids": t})["logits"] for t in wanted]
        errors[text] = sum(float((a - b).square().sum()) for a, b in zip(after, before, strict=True))
    assert errors[method] < errors["gptq"]
