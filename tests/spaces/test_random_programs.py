"""Every function-preserving pass on random programs: nothing may change but the program's text."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
from hypothesis import given, settings
from spaces import random_programs
from spaces.random_blocks.graph import Graph
from spaces.random_blocks.wiring import LAYERS
from spaces.random_programs import (
    PIPELINES,
    Block,
    Mismatch,
    Plan,
    build,
    check,
    feeds,
    is_usable,
    plans,
    random_plan,
    random_program,
    simplest,
    usable_plan,
)

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report
from qcompile.pass_manager import op_counts

aten = torch.ops.aten
COUNT = 120
EACH = 6  # pipelines that a program goes through; all of them have their turn


@functools.cache
def _program(seed: int) -> Program:
    return random_program(seed)


MET = {
    184: "raise-norms, permute",  # heads that share a space, rolled over each other
    1048: "raise-norms, equalize",  # a product without outputs
    5370: "raise-norms, permute",  # a gain that a norm reads of which no channels are known
    30059: "raise-norms, fold-embedding-norm, fold-norm-affine, center-norm, rotate(qk=true, orphans=true)",  # q is v
    30551: "raise-norms, fold-embedding-norm",  # two norms behind a table that is tied
    20220: "raise-norms, center-norm",  # a table that a product reads of which no channels are known
}
"""Programs that a pass once got wrong."""


@pytest.mark.parametrize("seed", MET)
def test_what_went_wrong_once(seed: int) -> None:
    check(_program(seed), MET[seed])


@pytest.mark.parametrize("seed", range(COUNT))
def test_no_pass_changes_the_function(seed: int) -> None:
    for turn in range(min(EACH, len(PIPELINES))):
        check(_program(seed), PIPELINES[(seed * EACH + turn) % len(PIPELINES)])


@settings(max_examples=20)
@given(plans().filter(lambda plan: is_usable(build(plan))))
def test_no_pass_changes_the_function_of_plans_that_shrink(plan: Plan) -> None:
    program = build(plan)
    for pipeline in PIPELINES:
        check(program, pipeline)


def test_programs_are_of_all_kinds() -> None:
    operators: Counter[str] = Counter()
    symbolic = 0
    for seed in range(COUNT):
        operators.update(op_counts(_program(seed)).keys())
        symbolic += "aten.sym_size.int" in op_counts(_program(seed)) or bool(_program(seed).symbols)
    kinds = {block.kind for seed in range(COUNT) for block in random_plan(seed).blocks}
    assert kinds == set(LAYERS)
    assert symbolic >= 5
    assert len(operators) >= 80
    assert min(operators[f"aten.{op}.default"] for op in ("rms_norm", "layer_norm", "linear", "conv1d", "einsum")) >= 20


def test_a_seed_gives_one_program() -> None:
    first, second = random_program(3), random_program(3)
    assert str(first) == str(second)
    assert all(torch.equal(first.weights[key], second.weights[key]) for key in first.weights)
    assert eval(repr(random_plan(3)), {"Plan": Plan, "Block": Block}) == random_plan(3)


def test_weights_stay_where_blocks_go() -> None:
    both = build(Plan((Block("mlp"), Block("attention")), seed=5))
    one = build(Plan((Block("mlp"),), seed=5))
    for key in one.weights:
        assert torch.equal(one.weights[key], both.weights[key])


def test_symbolic_programs_are_fed_two_sizes() -> None:
    program = build(Plan((Block("attention"),), symbolic=True))
    assert [tuple(given["ids"].shape) for given in feeds(program)] == [(2, 5), (3, 4)]


def test_a_program_that_rounding_moves_is_not_used() -> None:
    g = Graph(symbolic=False, seed=0)
    x = g.call("linear", g.input("vectors", "f64", "b", "s", 4), g.weight("w", [4, 4]))
    g.output("out", g.call("sin", g.mul(x, 1e8)))
    assert not is_usable(g.program())


@dataclass(frozen=True)
class _LosesABias(Pass):
    """Forgets the bias of the first layer norm: a fault that the check must see."""

    name: ClassVar[str] = "loses-a-bias"

    def run(self, program: Program) -> Report:
        report = Report()
        for node in program.calls(aten.layer_norm.default)[:1]:
            program.set_arg(node, "bias", None)
            report.rewrote(node)
        return report


def test_a_fault_is_caught_and_made_small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(random_programs, "parse_pipeline", lambda text: [_LosesABias()])

    def fails(plan: Plan) -> bool:
        try:
            check(build(plan), "loses-a-bias")
        except Mismatch:
            return True
        return False

    plan = next(plan for seed in range(50) if fails(plan := usable_plan(seed)))
    with pytest.raises(Mismatch, match="loses-a-bias moved the outputs by"):
        check(build(plan), "loses-a-bias")
    small = simplest(plan, fails, tries=120)
    assert fails(small)
    assert len(build(small).nodes) < len(build(plan).nodes)
