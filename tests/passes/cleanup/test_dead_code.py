"""DeadCode: what goes, what stays, and that it is said."""

from __future__ import annotations

import operator

from qcompile.ir.program import Program
from qcompile.pass_manager import PassManager
from qcompile.passes.cleanup.dead_code import DeadCode

TEXT = """\
def main(x: f32[2, 4], unread: i64[2], *, w: f32[4, 4], v: f32[4] = "unread.weight"):
    y: f32[2, 4] = aten.linear.default(x, w)  # proj
    return {"y": y}"""


def _with_dead_calls() -> Program:
    program = Program.parse(TEXT)
    (linear,) = program.nodes
    vector = program.weight_nodes[-1]
    dead = program.call(operator.add, (1, 2), before=linear, name="dead_scalar")
    program.call(program.graph.find_nodes(op="call_function", target=operator.add)[0].target, (dead, 1), before=linear)
    import torch

    moved = program.call(torch.ops.aten.neg.default, (vector,), before=linear, name="dead", module="act")
    program.call(torch.ops.aten.neg.default, (moved,), before=linear, name="deader")
    return program


def test_removes_chains_and_the_weights_behind_them() -> None:
    program = _with_dead_calls()
    report = DeadCode().run(program)
    assert str(program) == TEXT.replace(', v: f32[4] = "unread.weight"', "")
    assert list(program.weights) == ["w"]
    said = {(e.where, e.what) for e in report.rewritten}
    assert ("act (dead)", "nothing reads it") in said
    assert ("unread.weight", "no call reads this weight") in said
    assert len(said) == 5
    program.verify()


def test_inputs_stay() -> None:
    program = Program.parse(TEXT.replace(', v: f32[4] = "unread.weight"', ""))
    (report,) = PassManager([DeadCode()]).run(program)
    assert report.rewritten == []
    assert [(e.where, e.what) for e in report.skipped] == [
        ("unread", "nothing reads this input, but it is part of the program's signature")
    ]
