"""fold-embedding-norm: golden IR, rows against a plain formula, and near misses."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile import run_passes
from qcompile.ir.program import Program
from qcompile.passes.norm.fold_embedding_norm import FoldEmbeddingNorm

BLOOM = """\
    def main(ids: i64[batch, sequence], *, table: f64[9, 6], g: f64[6], b: f64[6]):
        x: f64[batch, sequence, 6] = aten.embedding.default(table, ids)
        n: f64[batch, sequence, 6] = aten.layer_norm.default(x, [6], g, b, 0.01)
        y: f64[batch, sequence, 6] = aten.tanh.default(n)
        return {"y": y}"""

FOLDED = """\
    def main(ids: i64[batch, sequence], *, table: f64[9, 6]):
        x: f64[batch, sequence, 6] = aten.embedding.default(table, ids)
        y: f64[batch, sequence, 6] = aten.tanh.default(x)
        return {"y": y}"""


def change(*pairs: tuple[str, str], text: str = BLOOM) -> str:
    for old, new in pairs:
        assert old in text
        text = text.replace(old, new)
    return text


def test_layer_norm(golden: Callable[..., Any]) -> None:
    report = golden(FoldEmbeddingNorm(), BLOOM, FOLDED)
    assert report.rewritten[0].what == "folded into the rows of 'table'"


@pytest.mark.parametrize("eps", ["0.5", "None"])
def test_rms_norm(eps: str, golden: Callable[..., Any]) -> None:
    norm = "aten.layer_norm.default(x, [6], g, b, 0.01)"
    golden(
        FoldEmbeddingNorm(),
        change((norm, f"aten.rms_norm.default(x, [6], g, {eps})"), (", b: f64[6]", "")),
        FOLDED,
    )


def test_rows_are_normalised_in_float64_and_rounded_once() -> None:
    program = Program.parse(textwrap.dedent(BLOOM.replace("f64", "bf16")))
    table, gain, bias = (program.weights[key].double() for key in ("table", "g", "b"))
    run_passes(program, "fold-embedding-norm")
    centred = table - table.mean(-1, keepdim=True)
    wanted = centred / (centred.square().mean(-1, keepdim=True) + 0.01).sqrt() * gain + bias
    assert torch.equal(program.weights["table"], wanted.float().bfloat16())


def test_a_tied_head_keeps_the_table(golden: Callable[..., Any]) -> None:
    head = "        l: f64[batch, sequence, 9] = aten.linear.default(y, table)\n"
    tie = ("        return", f"{head}        return"), ('{"y": y}', '{"y": y, "l": l}')
    report = golden(
        FoldEmbeddingNorm(),
        change(*tie),
        change(
            ("default(table, ids)", "default(table_untied, ids)"),
            ("table: f64[9, 6]", 'table: f64[9, 6], table_untied: f64[9, 6] = "table.untied"'),
            *tie,
            text=FOLDED,
        ),
    )
    assert "'table' is untied for x" in report.notes[0]


_X = "        x: f64[batch, sequence, 6] = aten.embedding.default(table, ids)\n"
NEAR_MISSES = {
    "positions are added": (
        change(
            ("table: f64[9, 6]", "table: f64[9, 6], places: f64[sequence, 6]"),
            (_X, _X + "        p: f64[batch, sequence, 6] = aten.add.Tensor(x, places)\n"),
            ("default(x, [6]", "default(p, [6]"),
        ).replace("places: f64[sequence, 6]", "places: f64[1, 6]"),
        "its input p (aten.add.Tensor) is made of embeddings, and is not one by itself",
    ),
    "a stream that starts there": (
        change(('{"y": y}', '{"y": y, "x": x}')),
        "the embedding x is also read by output",
    ),
    "two axes": (
        change(("ids: i64[batch, sequence]", "ids: i64[batch, 3]"), ("sequence", "3"), ("[6], g, b", "[3, 6], g, b"))
        .replace("g: f64[6]", "g: f64[3, 6]")
        .replace("b: f64[6]", "b: f64[3, 6]"),
        "it normalises more than the features of a row",
    ),
    "a computed gain": (
        change(
            (_X, _X + "        o: f64[6] = aten.add.Tensor(g, 1)\n"),
            ("[6], g, b", "[6], o, b"),
        ),
        "its weight o is computed; raise-norms stores it",
    ),
    "a table that is turned": (
        change(
            ("table: f64[9, 6]", "table: f64[6, 9]"),
            (_X, "        t: f64[9, 6] = aten.t.default(table)\n" + _X.replace("(table", "(t")),
        ),
        "the table of x is read through t",
    ),
}


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str, left_alone: Callable[..., Any]) -> None:
    text, reason = NEAR_MISSES[name]
    assert left_alone(FoldEmbeddingNorm(), text) == [reason]


def test_nothing_to_fold(left_alone: Callable[..., Any]) -> None:
    text = """\
    def main(x: f64[2, 6]):
        y: f64[2, 6] = aten.layer_norm.default(x, [6])
        return {"y": y}"""
    assert left_alone(FoldEmbeddingNorm(), text) == []
    (report,) = run_passes(Program.parse(textwrap.dedent(text)), "fold-embedding-norm")
    assert report.notes == ["no norm reads an embedding"]
