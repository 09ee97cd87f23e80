"""Rounding to nearest and storing: the same bits as the program that rounds as it runs."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch

from qcompile.errors import SpecError
from qcompile.ir.program import Program
from qcompile.numerics.qtensor import sqnr_db
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import Report
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN
from qcompile.recipe import Rule

Feeds = Callable[..., dict[str, torch.Tensor]]
Golden = Callable[[RTN, str, str], Report]


def test_golden(golden: Golden) -> None:
    report = golden(
        RTN(),
        """
        def main(x: f32[n, 8], *, w: f32[4, 8], v: f32[2, 4] = "v.weight"):
            p = qcompile.choose_qparams.default(w, "int4 sym group=4")  # a
            s = operator.getitem(p, 0)  # a
            c = qcompile.quantize.default(w, s, None, "int4 sym group=4")  # a
            d = qcompile.dequantize.default(c, s, None, "int4 sym group=4")  # a
            y = aten.linear.default(x, d)  # a
            p2 = qcompile.choose_qparams.default(v, "uint8 asym channel")  # b
            s2 = operator.getitem(p2, 0)  # b
            z2 = operator.getitem(p2, 1)  # b
            c2 = qcompile.quantize.default(v, s2, z2, "uint8 asym channel")  # b
            d2 = qcompile.dequantize.default(c2, s2, z2, "uint8 asym channel")  # b
            z = aten.linear.default(y, d2)  # b
            return {"z": z}
        """,
        """
        def main(
            x: f32[n, 8],
            *,
            w_codes: i8[4, 8] = "w.codes",
            w_scale: f32[4, 2] = "w.scale",
            v_weight_codes: u8[2, 4] = "v.weight.codes",
            v_weight_scale: f32[2, 1] = "v.weight.scale",
            v_weight_zero_point: u8[2, 1] = "v.weight.zero_point",
        ):
            d: f32[4, 8] = qcompile.dequantize.default(w_codes, w_scale, None, "int4 sym group=4")  # a
            y: f32[n, 4] = aten.linear.default(x, d)  # a
            d2: f32[2, 4] = qcompile.dequantize.default(v_weight_codes, v_weight_scale, v_weight_zero_point, "uint8 asym channel")  # b
            z: f32[n, 2] = aten.linear.default(y, d2)  # b
            return {"z": z}
        """,
    )
    assert {e.where: e.what for e in report.rewritten} == {"w": "int4 sym group=4", "v.weight": "uint8 asym channel"}
    assert report.measured["w"]["bits_per_weight"] == 4 + 32 / 4
    assert report.measured["v.weight"]["bits_per_weight"] == 8 + (32 + 8) / 4


@pytest.mark.parametrize("spec", ["int4 group=4", "uint3 asym group=8", "int8 channel", "int2 sym tensor scale=f16"])
@pytest.mark.parametrize("dtype", ["f32", "bf16"])
def test_the_same_bits(spec: str, dtype: str, feeds: Feeds) -> None:
    program = Program.parse(
        f"""def main(x: {dtype}[n, 16], *, w: {dtype}[8, 16], v: {dtype}[8, 8]):
    y = aten.linear.default(x, w)
    t = aten.t.default(v)
    z = aten.matmul.default(y, t)
    return {{"z": z}}"""
    )
    weight, inputs = program.weights["w"], feeds(program)
    PassManager([InsertQDQ(weights=spec)]).run(program)
    simulated = program.run(inputs)["z"]
    (report,) = PassManager([RTN()]).run(program)
    assert torch.equal(program.run(inputs)["z"], simulated)
    expected = QuantSpec.parse(spec).quantize(weight)
    assert torch.equal(program.weights["w.codes"], expected.codes)
    assert torch.equal(program.weights["w.scale"], expected.scale)
    assert report.measured["w"]["sqnr_db"] == sqnr_db(weight, expected.dequantize(weight.dtype))
    assert "w" not in program.weights


def test_a_weight_with_two_specs_is_stored_twice() -> None:
    program = Program.parse(
        """def main(x: f32[n, 8], *, w: f32[8, 8]):
    a = aten.linear.default(x, w)  # first
    b = aten.linear.default(a, w)  # second
    return {"b": b}"""
    )
    rules = (Rule(match="second", weights="int4 sym channel"),)
    PassManager([InsertQDQ(weights="int8 sym channel", rules=rules), RTN()]).run(program)
    assert sorted(program.weights) == ["w.codes", "w.scale", "w_2.codes", "w_2.scale"]


def test_nothing_marked_is_said() -> None:
    program = Program.parse(
        """def main(x: f32[n, 8], *, w: f32[4, 8]):
    y = aten.linear.default(x, w)
    return {"y": y}"""
    )
    (report,) = PassManager([RTN()]).run(program)
    assert report.notes == ["no weight is marked for rounding; insert-qdq, before this pass, marks them"]


NAMED = """def main(x: f32[n, 64], *, w: f32[4, 64] = "a.up.weight"):
    y = aten.linear.default(x, w)  # a.up
    return {"y": y}"""


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("spec", ["int4 sym group=16", "uint8 asym tensor", "e4m3fn channel", "nvfp4"])
def test_what_is_not_finite_is_named(spec: str, value: float) -> None:
    program = Program.parse(NAMED)
    program.weights["a.up.weight"] = torch.ones(4, 64).index_fill(1, torch.tensor([3]), value)
    with pytest.raises(SpecError) as caught:
        PassManager([InsertQDQ(weights=spec), RTN()]).run(program)
    assert str(caught.value).startswith("weight 'a.up.weight': ")
    assert "nan or infinity" in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("value", [float("nan"), float("-inf")])
def test_a_format_that_can_hold_nan_counts_its_blocks(value: float) -> None:
    program = Program.parse(NAMED)
    weight = torch.ones(4, 64)
    weight[1, 3] = weight[1, 5] = weight[2, 40] = value
    program.weights["a.up.weight"] = weight
    reports = PassManager([InsertQDQ(weights="mxfp4(even)"), RTN()]).run(program)
    assert reports[-1].notes == ["a.up.weight: 2 of 8 blocks hold nan or infinity, and decode to nan"]


def test_a_weight_with_nothing_in_it_is_left_alone_with_the_reason() -> None:
    program = Program.parse(NAMED.replace("f32[4, 64]", "f32[0, 64]"))
    reports = PassManager([InsertQDQ(weights="int4 sym group=16"), RTN()]).run(program)
    assert [(e.where, e.what) for e in reports[0].skipped] == [
        ("a.up", "stays float (its weight 'a.up.weight' [0, 64] has no elements)")
    ]
    assert program.run({"x": torch.ones(2, 64)})["y"].shape == (2, 0)


class Counted:
    """A weight that knows how many of its kind are alive when it is read."""

    alive = peak = 0

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, torch.float32

    def read(self) -> torch.Tensor:
        tensor = torch.randn(self.shape)
        storage = tensor.untyped_storage()
        Counted.alive += 1
        Counted.peak = max(Counted.peak, Counted.alive)
        weakref.finalize(storage, self._gone)
        return tensor

    @staticmethod
    def _gone() -> None:
        Counted.alive -= 1


def test_one_weight_in_memory_at_a_time() -> None:
    names = [f"w{i}" for i in range(5)]
    weights = ", ".join(f"{n}: f32[8, 8]" for n in names)
    steps = "\n".join(f"    y{i} = aten.linear.default({'x' if i == 0 else f'y{i - 1}'}, w{i})" for i in range(5))
    program = Program.parse(f"def main(x: f32[n, 8], *, {weights}):\n{steps}\n    return {{'y': y4}}")
    for name in names:
        program.weights.bind(name, Counted((8, 8)))
    PassManager([InsertQDQ(weights="int4 sym channel")]).run(program)
    assert Counted.peak == 0  # nothing is read to decide
    PassManager([RTN()]).run(program)
    gc.collect()
    assert Counted.peak <= 2  # the next is read before the name of the last is bound anew
    assert Counted.alive == 0


@pytest.mark.parametrize(("kind", "changes"), [("mixtral", {"num_local_experts": 4}), ("gpt2", {}), ("opt", {})])
def test_the_same_bits_on_decoders(kind: str, changes: dict[str, int], tiny_decoder: Callable[..., Any]) -> None:
    _, program = tiny_decoder(kind, **changes)
    ids = torch.arange(14).view(2, 7)
    PassManager([InsertQDQ(weights="int4 asym group=16", activations="int8 sym token dynamic")]).run(program)
    simulated = program(ids)
    (report,) = PassManager([RTN()]).run(program)
    assert torch.equal(program(ids), simulated)
    assert all(figures["sqnr_db"] > 15 for figures in report.measured.values())
    assert len(report.measured) == len(report.rewritten) > 3
