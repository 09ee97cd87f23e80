"""Tables of embeddings, results, convolutions and einsums: what is inserted, and what the program then computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.errors import QCompileError
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.plain import without_rounding
from qcompile.passes.quantize.rtn import RTN
from qcompile.recipe import Rule

Feeds = Callable[..., dict[str, torch.Tensor]]
QUANTIZE = torch.ops.qcompile.quantize.default


def insert(program: Program, **options: Any) -> Report:
    (report,) = PassManager([InsertQDQ(**options)]).run(program)
    return report


def rounded(tensor: torch.Tensor, spec: str) -> torch.Tensor:
    return QuantSpec.parse(spec).quantize(tensor).dequantize()


TIED = """def main(ids: i64[batch, sequence], *, e: f32[16, 8], w: f32[8, 8]):
    x = aten.embedding.default(e, ids)  # embed
    y = aten.linear.default(x, w)  # middle
    z = aten.linear.default(y, e)  # head
    return {"logits": z}"""


@pytest.mark.parametrize(
    ("embeddings", "head", "note"),
    [
        ("int8 sym channel", None, "e stays float as well, for head: 0.00 MB beside its codes"),
        ("int8 sym channel", "int4 sym channel", "e is stored 2 times, its readers having as many specs"),
        ("int4 sym group=4", "int4 sym group=4", None),
    ],
)
def test_a_tied_table(embeddings: str, head: str | None, note: str | None, feeds: Feeds) -> None:
    program, plain = Program.parse(TIED), Program.parse(TIED)
    inputs, e, w = feeds(program), plain.weights["e"], plain.weights["w"]
    report = insert(program, embeddings=embeddings, head=head)
    assert report.notes == ([] if note is None else [note])
    looked_up = rounded(e, embeddings)[inputs["ids"]]
    expected = looked_up @ w.t() @ (e if head is None else rounded(e, head)).t()
    assert torch.allclose(program.run(inputs)["logits"], expected, atol=1e-6)
    assert len(program.calls(QUANTIZE)) == len({embeddings, head} - {None})
    simulated = program.run(inputs)["logits"]
    PassManager([RTN()]).run(program)
    assert torch.equal(program.run(inputs)["logits"], simulated)
    assert ("e" in program.weights) == (head is None)


def test_results_are_quantized_behind_the_bias() -> None:
    program = Program.parse(
        """def main(x: f32[n, 8], *, w: f32[4, 8], b: f32[4], v: f32[2, 4]):
    y = aten.linear.default(x, w, b)  # up
    r = aten.relu.default(y)
    z = aten.linear.default(r, v)  # down
    return {"y": y, "z": z}"""
    )
    report = insert(program, outputs="int8 sym tensor dynamic", rules=(Rule(match="down", outputs=None),))
    expected = """\
def main(x: f32[n, 8], *, w: f32[4, 8], b: f32[4], v: f32[2, 4]):
    y: f32[n, 4] = aten.linear.default(x, w, b)  # up
    output_qparams: tuple[f32[1, 1]] = qcompile.choose_qparams.default(y, "int8 sym tensor dynamic")  # up
    output_scale: f32[1, 1] = operator.getitem(output_qparams, 0)  # up
    output_quantize: i8[n, 4] = qcompile.quantize.default(y, output_scale, None, "int8 sym tensor dynamic")  # up
    output_dequantize: f32[n, 4] = qcompile.dequantize.default(output_quantize, output_scale, None, "int8 sym tensor dynamic")  # up
    r: f32[n, 4] = aten.relu.default(output_dequantize)
    z: f32[n, 2] = aten.linear.default(r, v)  # down
    return {"y": output_dequantize, "z": z}"""
    assert str(program) == expected
    assert [(e.where, e.what) for e in report.rewritten] == [("up", "result y: int8 sym tensor dynamic (default)")]
    assert [(e.where, e.what) for e in report.skipped] == [("down", "stays float (rules.0)")]


CHAIN = """def main(x: f32[n, 8], *, w: f32[8, 8], v: f32[8, 8]):
    y = aten.linear.default(x, w)  # a
    z = aten.linear.default(y, v)  # b
    return {"z": z}"""


def test_an_input_of_the_same_spec_takes_the_result_as_it_is(feeds: Feeds) -> None:
    program = Program.parse(CHAIN)
    insert(program, activations="int4 sym token dynamic", outputs="int4 sym token dynamic")
    assert len(program.calls(QUANTIZE)) == 3  # x, y, z
    inputs, weights = feeds(program), Program.parse(CHAIN).weights
    y = rounded(rounded(inputs["x"], "int4 sym token dynamic") @ weights["w"].t(), "int4 sym token dynamic")
    expected = rounded(y @ weights["v"].t(), "int4 sym token dynamic")
    assert torch.allclose(program.run(inputs)["z"], expected, atol=1e-6)


def test_an_input_of_another_spec_is_rounded_again(feeds: Feeds) -> None:
    program = Program.parse(CHAIN)
    insert(program, activations="int4 sym token dynamic", outputs="int8 sym tensor dynamic")
    assert len(program.calls(QUANTIZE)) == 4
    inputs, weights = feeds(program), Program.parse(CHAIN).weights
    y = rounded(rounded(inputs["x"], "int4 sym token dynamic") @ weights["w"].t(), "int8 sym tensor dynamic")
    expected = rounded(rounded(y, "int4 sym token dynamic") @ weights["v"].t(), "int8 sym tensor dynamic")
    assert torch.allclose(program.run(inputs)["z"], expected, atol=1e-6)
    assert str(without_rounding(program)) == str(Program.parse(CHAIN))


def test_inserting_results_twice_changes_nothing() -> None:
    program = Program.parse(CHAIN)
    insert(program, outputs="int8 sym tensor dynamic")
    before = str(program)
    report = insert(program, outputs="int4 sym tensor dynamic")
    assert str(program) == before
    assert [e.what for e in report.skipped] == ["its result is quantized already by all that read it"] * 2


def test_static_results_are_called_output() -> None:
    text = """def main(input_ids: i64[batch, sequence], *, e: f32[16, 8], w: f32[8, 8], v: f32[8, 8]):
    x = aten.embedding.default(e, input_ids)  # embed
    y = aten.linear.default(x, w)  # a
    z = aten.linear.default(y, v)  # b
    return {"z": z}"""
    program, plain = Program.parse(text), Program.parse(text)
    ids = torch.arange(12).view(2, 6)
    rules = (Rule(match="b", activations="int4 sym tensor static"),)
    passes = [InsertQDQ(outputs="int8 sym tensor static", rules=rules), Calibrate()]
    reports = PassManager(passes, batches=[ids]).run(program)
    assert [e.where for e in reports[-1].rewritten] == ["a.output", "b.input", "b.output"]
    y = plain.weights["e"][ids] @ plain.weights["w"].t()
    largest = y.abs().max()  # of the float program, for b's input too, though it reads y rounded
    assert torch.allclose(program.weights["a.output.scale"], largest / 127.5, rtol=1e-5)
    assert torch.allclose(program.weights["b.input.scale"], largest / 7.5, rtol=1e-5)
    broken = Program.parse(text)
    broken.weights["w"] = torch.full((8, 8), torch.nan)
    with pytest.raises(QCompileError, match=r"^output of a in calibration samples 0-1: int8 sym tensor static: .*nan"):
        PassManager(passes, batches=[ids]).run(broken)


class Convolutions(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Conv1d(4, 8, 3, padding=1)
        self.depthwise = torch.nn.Conv1d(8, 8, 3, padding=1, groups=8)
        self.grouped = torch.nn.Conv1d(8, 6, 1, groups=2)
        self.up = torch.nn.ConvTranspose1d(6, 4, 2, stride=2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.up(self.grouped(torch.relu(self.depthwise(self.first(x)))))
        return y


@pytest.mark.parametrize(
    ("spec", "stored"),
    [
        ("int8 sym channel", {"up": "int8 sym channel axis=1"}),
        ("int8 sym tensor", {}),
        ("uint8 asym channel axis=1", {"up": "uint8 asym channel"}),
        (
            "int4 sym group=2",
            dict.fromkeys(("first", "grouped"), "int4 sym group=2 axis=1") | {"up": "int4 sym group=2 axis=0"},
        ),
    ],
)
def test_convolutions_compute_with_rounded_weights(spec: str, stored: dict[str, str]) -> None:
    module = Convolutions().eval()
    x = torch.randn(2, 4, 9)
    with torch.no_grad():
        program = from_exported(torch.export.export(module, (x,), strict=False))
        rules = (Rule(match="depthwise", weights=None),) if "group" in spec else ()
        insert(program, weights=spec, rules=rules)
        for name, layer in module.named_children():
            if not rules or name != "depthwise":
                layer.weight.data = rounded(layer.weight.data, stored.get(name, spec))
        expected = module(x)
    assert torch.allclose(program.run({"x": x})["output"], expected, atol=1e-6)
    simulated = program.run({"x": x})["output"]
    PassManager([RTN()]).run(program)
    assert torch.equal(program.run({"x": x})["output"], simulated)
    assert {k for k in program.weights if k.endswith(".codes")} == {
        f"{name}.weight.codes" for name, _ in module.named_children() if not rules or name != "depthwise"
    }


def test_inputs_and_results_of_a_convolution(feeds: Feeds) -> None:
    text = """def main(x: f32[2, 4, 9], *, w: f32[6, 4, 3]):
    y = aten.conv1d.default(x, w)
    return {"y": y}"""
    program, plain = Program.parse(text), Program.parse(text)
    inputs = feeds(program)
    insert(program, activations="int4 sym token dynamic", outputs="int4 sym channel static")
    places, channels = "int4 sym channel axis=0,2 dynamic", "int4 sym channel axis=1 static"
    y = torch.nn.functional.conv1d(rounded(inputs["x"], places), plain.weights["w"])
    assert torch.allclose(program.run(inputs)["y"], rounded(y, channels), atol=1e-6)


def test_an_einsum_that_shares_a_transpose(feeds: Feeds) -> None:
    """The weight is one of a list of operands; its moves are copied for the reader that is quantized."""
    text = """def main(x: f32[3, 5, 4], *, w: f32[6, 4]):
    t = aten.t.default(w)
    y = aten.einsum.default("abc,ch->abh", [x, t])  # first
    z = aten.matmul.default(x, t)  # second
    return {"y": y, "z": z}"""
    program, plain = Program.parse(text), Program.parse(text)
    inputs = feeds(program)
    insert(program, rules=(Rule(operator="einsum", weights="int4 sym group=2"),))
    found, w = program.run(inputs), plain.weights["w"]
    assert torch.allclose(found["y"], inputs["x"] @ rounded(w, "int4 sym group=2").t(), atol=1e-6)
    assert torch.equal(found["z"], inputs["x"] @ w.t())
