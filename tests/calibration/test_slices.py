"""A chain of slices computes what the whole program computes, bit for bit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from calibration.tiny import decoder, tokens
from families import captured
from torch import Tensor, fx

from qcompile import run_passes
from qcompile.calibration.chain import Target, cut
from qcompile.calibration.slices import Slice
from qcompile.errors import QCompileError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.passes.quantize.plain import without_rounding

QUANTIZED = "insert-qdq(weights=int4 sym channel, activations=int8 asym token dynamic)"


def check(program: Program, batch: Mapping[str, Tensor], sequential: bool = True) -> int:
    """Run stage by stage, looking at every input of a product on the way; returns how many were compared."""
    plain = without_rounding(program)
    chain = cut(plain, [Target(c.node, c.input) for c in find_contractions(plain)], sequential)
    feeds = fill(program, batch)
    whole: dict[str, Any] = {}

    def observe(node: fx.Node, value: Any) -> None:
        whole[node.name] = value

    run(program, feeds, observe)
    values: dict[str, Tensor] = {}
    compared = 0
    for stage in chain.stages:
        looked_at = Slice(program, stage.starts, [t.value.name for t in stage.targets]).run(values, feeds)
        values = Slice(program, stage.starts, stage.ends).run(values, feeds)
        for name, value in {**looked_at, **values}.items():
            assert torch.equal(value, torch.as_tensor(whole[name])), name
            compared += 1
    return compared


@pytest.mark.parametrize(("name", "segments"), [("llama", 5), ("gpt2", 5), ("bert", 6), ("mixtral", 5)])
def test_families(name: str, segments: int) -> None:
    """Two segments a layer, and one or two for the head."""
    program, batch = captured.capture_family(name).program, captured.inputs_of(name, 2, 6)
    targets = [Target(c.node, c.input) for c in find_contractions(program)]
    chain = cut(program, targets)
    assert chain.segments == segments, chain.describe()
    assert not chain.carried
    assert sorted(t.at.name for stage in chain.stages for t in stage.targets) == sorted(t.at.name for t in targets)
    assert check(program, batch) >= 13
    run_passes(program, QUANTIZED)
    assert check(program, batch) >= 13


@pytest.mark.parametrize("sequential", [True, False])
@pytest.mark.parametrize("passes", ["", QUANTIZED])
def test_a_decoder_in_float32(passes: str, sequential: bool) -> None:
    program = decoder(2, "f32")
    if passes:
        run_passes(program, passes)
    assert check(program, {"input_ids": tokens()[0]}, sequential) >= 13


def test_sizes_and_parts_of_tuples_between_stages() -> None:
    """A size that is read off a value, and one part of a split, are alive where the program is cut."""
    program = Program.parse(
        """def main(input_ids: i64[batch, sequence], *, e: f32[32, 8], w0: f32[8, 8], w1: f32[4, 8], w2: f32[4, 4],
        w3: f32[4, 4]):
    a = aten.embedding.default(e, input_ids)
    b = aten.linear.default(a, w0)
    rows = aten.sym_size.int(b, 0)
    s = aten.split.Tensor(b, 4, -1)
    c = aten.linear.default(b, w1)
    f = aten.relu.default(c)
    d = aten.linear.default(f, w2)
    l = operator.getitem(s, 0)
    r = operator.getitem(s, 1)
    g = aten.mul.Tensor(l, r)
    h = aten.mul.Tensor(d, g)
    j = aten.view.default(h, [rows, -1, 4])
    y = aten.linear.default(j, w3)
    return {"y": y}"""
    )
    chain = cut(program, [Target(c.node, c.input) for c in find_contractions(program)])
    kept = {name for stage in chain.stages for name in stage.starts}
    assert {"rows", "l", "r"} <= kept
    assert check(program, {"input_ids": tokens()[0]}) >= 10


def test_weights_and_what_they_alone_decide_are_computed_once() -> None:
    program = decoder(1, "f32")
    run_passes(program, "insert-qdq(weights=int4 sym channel)")
    part = Slice(program, ["n0"], ["q0"])
    assert part.weights == ["wq0"]
    first = part.run({"n0": torch.ones(1, 3, 16)}, {})["q0"]
    program.weights["wq0"] = torch.zeros(16, 16)
    assert torch.equal(part.run({"n0": torch.ones(1, 3, 16)}, {})["q0"], first)


def test_a_name_that_is_not_there() -> None:
    with pytest.raises(QCompileError, match="the program has no value 'nowhere'; a pass took it away"):
        Slice(decoder(1), [], ["nowhere"])


def test_an_error_names_the_call() -> None:
    with pytest.raises(RuntimeError) as caught:
        Slice(decoder(1), ["n0"], ["q0"]).run({"n0": torch.ones(1, 3, 7, dtype=torch.float64)}, {})
    assert any("wq0" in note and "module '0.q'" in note for note in caught.value.__notes__)
