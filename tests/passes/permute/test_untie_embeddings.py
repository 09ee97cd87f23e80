"""untie-embeddings: golden IR, what the copy costs, and nothing to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from qcompile import run_passes
from qcompile.ir.program import Program
from qcompile.passes.permute.untie_embeddings import UntieEmbeddings

TIED = """\
    def main(ids: i64[batch, sequence], *, table: f64[9, 6]):
        x: f64[batch, sequence, 6] = aten.embedding.default(table, ids)
        h: f64[batch, sequence, 6] = aten.tanh.default(x)
        {head}
        return {{"logits": y}}"""
PLAIN = "y: f64[batch, sequence, 9] = aten.linear.default(h, {table})"
TURNED = """\
w: f64[6, 9] = aten.t.default({table})
        y: f64[batch, sequence, 9] = aten.matmul.default(h, {table_t})"""


def test_the_head_gets_a_copy(golden: Callable[..., Any]) -> None:
    after = TIED.replace("table: f64[9, 6]", 'table: f64[9, 6], table_untied: f64[9, 6] = "table.untied"')
    head = PLAIN.format(table="table_untied")
    report = golden(UntieEmbeddings(), TIED.format(head=PLAIN.format(table="table")), after.format(head=head))
    assert report.measured == {"table.untied": {"bytes": 432.0}}
    assert report.rewritten[0].what == "reads its own 'table.untied', 432 bytes more"


def test_a_head_that_turns_the_table(feeds: Callable[..., Any]) -> None:
    program = Program.parse(TIED.format(head=TURNED.format(table="table", table_t="w")).replace("    def", "def", 1))
    inputs = feeds(program)
    before = program.run(inputs)["logits"]
    run_passes(program, "untie-embeddings")
    program.weights["table.untied"] = 2 * program.weights["table.untied"]
    assert torch.equal(program.run(inputs)["logits"], 2 * before)  # the embedding kept its own


def test_nothing_to_untie(left_alone: Callable[..., Any]) -> None:
    text = TIED.replace("table: f64[9, 6]", "table: f64[9, 6], head: f64[9, 6]").format(head=PLAIN.format(table="head"))
    assert left_alone(UntieEmbeddings(), text) == []
    (report,) = run_passes(Program.parse(text.replace("    def", "def", 1)), "untie-embeddings")
    assert report.notes == ["no table is both an embedding and the weight of a product: nothing to untie"]
