"""Tokens that experts see: counted from the graph, for every way of writing experts, and told where they are few."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.ir.program import Program
from qcompile.ir.run import run
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.routing import RoutingCounts
from qcompile.passes.quantize.rtn import RTN

Decoder = Callable[..., tuple[torch.nn.Module, Program]]
HEAD = "def main(x: f32[n, 4], i: i64[n], *, w: f32[3, 4, 6] = 'experts.up', v: f32[3, 6, 4] = 'experts.down'):"
# body, then tokens of each expert where i is [0, 0, 2, 0] and x[3] is zero
WRITTEN: dict[str, tuple[str, list[int]]] = {
    "gathered": (
        """u = aten.unsqueeze.default(x, 1)
    g = aten.index.Tensor(w, [i])
    a = aten.bmm.default(u, g)  # experts
    h = aten.index.Tensor(v, [i])
    y = aten.bmm.default(a, h)  # experts""",
        [3, 0, 1],
    ),
    "gathered with index_select behind a transpose": (
        """u = aten.unsqueeze.default(x, -1)
    t = aten.transpose.int(w, 0, 1)
    g = aten.index_select.default(t, 1, i)
    p = aten.permute.default(g, [1, 2, 0])
    y = aten.bmm.default(p, u)  # experts""",
        [3, 0, 1],
    ),
    "counted from the end": (
        """u = aten.unsqueeze.default(x, 1)
    j = aten.sub.Tensor(i, 3)
    g = aten.index.Tensor(w, [j])
    y = aten.bmm.default(u, g)  # experts""",
        [3, 0, 1],
    ),
    "unrolled": (
        """p = aten.slice.Tensor(x, 0, 0, 1)
    q = aten.slice.Tensor(x, 0, 1, 4)
    s = aten.select.int(w, 0, 0)
    t = aten.select.int(w, 0, 2)
    a = aten.matmul.default(p, s)  # experts.0
    b = aten.matmul.default(q, t)  # experts.2
    y = aten.cat.default([a, b])""",
        [1, 0, 2],  # the zero token counts for nothing
    ),
    "unbound": (
        """c = aten.unbind.int(w)
    s = operator.getitem(c, 1)
    y = aten.matmul.default(x, s)  # experts""",
        [0, 3, 0],
    ),
    "all at once, the tokens of others zero": (
        """h = aten.one_hot.default(i, 3)
    m = aten.to.dtype(h, torch.float32)
    t = aten.transpose.int(m, 0, 1)
    u = aten.unsqueeze.default(t, -1)
    z = aten.mul.Tensor(x, u)
    y = aten.bmm.default(z, w)  # experts""",
        [2, 0, 1],
    ),
}


def program(body: str) -> Program:
    return Program.parse(f"{HEAD}\n    {body}\n    return {{'y': y}}")


@pytest.mark.parametrize("name", WRITTEN)
def test_counted(name: str) -> None:
    body, expected = WRITTEN[name]
    p = program(body)
    counts = RoutingCounts(p)
    x = torch.ones(4, 4)
    x[3] = 0
    for _ in range(2):
        run(p, {"x": x, "i": torch.tensor([0, 0, 2, 0])}, lambda node, value: counts.observe(node.name, value))
    assert counts.tokens == {"experts": [2 * n for n in expected]}


def test_blocks_that_all_run_on_everything_are_no_experts_to_speak_of() -> None:
    p = program(
        "u = aten.unsqueeze.default(x, 0)\n    e = aten.expand.default(u, [3, -1, -1])\n    y = aten.bmm.default(e, w)"
    )
    counts = RoutingCounts(p)
    run(
        p,
        {"x": torch.ones(4, 4), "i": torch.zeros(4, dtype=torch.int64)},
        lambda node, value: counts.observe(node.name, value),
    )
    assert counts.tokens == {}


def test_experts_whose_tokens_cannot_be_counted_are_named() -> None:
    p = program(
        "u = aten.unsqueeze.default(x, 0)\n    e = aten.expand.default(u, [3, -1, -1])\n"
        '    y = aten.einsum.default("end,edh->enh", [e, w])  # experts'
    )
    report = Report()
    RoutingCounts(p).tell(report)
    assert [(e.where, e.what) for e in report.skipped] == [
        ("experts (y)", "which of its experts sees which token cannot be read off einsum")
    ]


def told(tokens: list[int]) -> Report:
    p = program(WRITTEN["gathered"][0])
    counts, report = RoutingCounts(p), Report()
    index = torch.tensor([e for e, n in enumerate(tokens) for _ in range(n)])
    run(p, {"x": torch.ones(len(index), 4), "i": index}, lambda node, value: counts.observe(node.name, value))
    counts.tell(report)
    return report


def test_what_a_report_says() -> None:
    report = told([900, 15, 17])
    assert report.measured == {
        "experts": {
            "experts": 3,
            "tokens_min": 15,
            "tokens_median": 17,
            "tokens_max": 900,
            "unseen_experts": 0,
            "rarely_seen_experts": 2,
        }
    }
    assert report.notes == [
        "warning: experts: 2 of 3 experts saw fewer than 16 calibration tokens or under 10% of an even share (311), "
        "0 of them none; expert (tokens): 1 (15), 2 (17); give more calibration data"
    ]
    assert told([40, 30, 16]).notes == []
    assert told([40, 30, 0]).notes[0].endswith("1 of them none; expert (tokens): 2 (0); give more calibration data")


def test_the_module_itself_agrees(tiny_decoder: Decoder) -> None:
    module, p = tiny_decoder("mixtral", num_local_experts=4)
    assert any("grouped_mm" in str(node.target) for node in p.nodes)
    name, experts = next((n, m) for n, m in module.named_modules() if n.endswith(".experts"))
    expected = torch.zeros(4, dtype=torch.int64)

    def count(_: Any, args: tuple[torch.Tensor, ...]) -> None:
        expected.add_(torch.bincount(args[1].reshape(-1), minlength=4))

    batches = [torch.arange(18).view(2, 9), torch.arange(40, 47)[None]]
    passes = [InsertQDQ(activations="int8 sym tensor static"), Calibrate()]
    report = PassManager(passes, batches=batches).run(p)[-1]
    hook = experts.register_forward_pre_hook(count)
    with torch.no_grad():
        for batch in batches:
            module(input_ids=batch)
    hook.remove()
    assert int(expected.sum()) == 2 * 25
    figures = report.measured[name]
    assert (figures["tokens_min"], figures["tokens_max"]) == (float(expected.min()), float(expected.max()))
    (note,) = [note for note in report.notes if name in note]
    assert all((f"{i} ({n})" in note) == (n < 16) for i, n in enumerate(expected.tolist()))


def test_without_calibration_nothing_is_said(tiny_decoder: Decoder) -> None:
    _, p = tiny_decoder("mixtral", num_local_experts=4)
    reports = PassManager([InsertQDQ(weights="int4 sym channel"), RTN()]).run(p)
    assert [note for report in reports for note in report.notes] == []
    assert not any("tokens_min" in figures for report in reports for figures in report.measured.values())
