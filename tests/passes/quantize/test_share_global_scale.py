"""Weights that read one activation share a global scale."""

from __future__ import annotations

import torch

from qcompile import zoo
from qcompile.capture import capture
from qcompile.ir.program import Program
from qcompile.numerics import QuantSpec, choose_qparams
from qcompile.numerics.parameters import QParams
from qcompile.numerics.qtensor import quantize_with
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN
from qcompile.passes.quantize.share_global_scale import ShareGlobalScale
from qcompile.recipe import Recipe, pipeline

TEXT = """def main(x: f32[n, 32], *, q: f32[16, 32], k: f32[8, 32], o: f32[16, 16]):
    a = aten.linear.default(x, q)  # q
    b = aten.linear.default(x, k)  # k
    c = aten.linear.default(a, o)  # o
    return {"a": c, "b": b}"""


def test_readers_of_one_value_share_and_others_do_not() -> None:
    program = Program.parse(TEXT)
    random = torch.Generator().manual_seed(0)
    for key, scale in (("q", 1.0), ("k", 5.0), ("o", 2.0)):
        shape, _ = program.weights.meta(key)
        program.weights[key] = torch.randn(shape, generator=random) * scale
    before = {key: program.weights[key] for key in ("q", "k", "o")}
    spec = QuantSpec.parse("nvfp4")
    _, report, _ = PassManager([InsertQDQ(weights="nvfp4"), ShareGlobalScale(), RTN()]).run(program)
    assert [done.where for done in report.rewritten] == ["q, k"]
    own = {key: choose_qparams(weight, spec).outer[0] for key, weight in before.items()}
    assert own["k"] < own["q"]
    for key in ("q", "k"):
        assert torch.equal(program.weights[f"{key}.global_scale"], own["k"])
    assert torch.equal(program.weights["o.global_scale"], own["o"])
    assert not any("shared" in key for key in program.weights)
    scale, _, outer = choose_qparams(before["q"], spec, (own["k"],))
    want = quantize_with(before["q"], QParams(scale, None, outer), spec)
    assert torch.equal(program.weights["q.codes"], want.codes)
    program.verify()


def test_of_an_embedded_model_and_without_global_scales() -> None:
    program = capture(zoo.path("llama"))
    _, report = PassManager([InsertQDQ(weights="nvfp4"), ShareGlobalScale()]).run(program)
    layers = int(program.info.get("num_hidden_layers") or 0) or len(report.rewritten) // 2
    assert len(report.rewritten) == 2 * layers
    assert "q_proj" in report.rewritten[0].where
    assert "gate_proj" in report.rewritten[1].where
    program.verify()
    program(torch.zeros(1, 2, dtype=torch.int64))
    other = Program.parse(TEXT)
    _, report = PassManager([InsertQDQ(weights="int4 sym"), ShareGlobalScale()]).run(other)
    assert report.notes == ["no weight has a global scale; nvfp4 and scale=e4m3 have"]


def test_a_recipe_lists_it_among_its_passes() -> None:
    recipe = Recipe(weights="nvfp4", passes=("raise-norms", "share-global-scale"))
    assert [p.name for p in pipeline(recipe)] == ["raise-norms", "insert-qdq", "share-global-scale", "rtn"]
