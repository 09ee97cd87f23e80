"""Experts are quantized one by one as linears are, however their stack is stored and read."""

from __future__ import annotations

import pytest
import torch

from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.rtn import RTN

EXPERTS, OUT, IN = 3, 8, 16
# body, type of the weight, the permutation that brings it to [experts, out, in]
LAYOUTS: dict[str, tuple[str, str, tuple[int, int, int]]] = {
    "gathered [E, out, in]": (
        """g = aten.index.Tensor(w, [i])
    u = aten.unsqueeze.default(x, -1)
    y = aten.bmm.default(g, u)""",
        "f32[3, 8, 16]",
        (0, 1, 2),
    ),
    "gathered [E, in, out]": (
        """g = aten.index.Tensor(w, [i])
    u = aten.unsqueeze.default(x, 1)
    y = aten.bmm.default(u, g)""",
        "f32[3, 16, 8]",
        (0, 2, 1),
    ),
    "grouped, transposed": (
        "t = aten.transpose.int(w, 1, 2)\n    y = transformers.grouped_mm_fallback.default(x, t, o)",
        "f32[3, 8, 16]",
        (0, 1, 2),
    ),
    "grouped [E, in, out]": (
        "y = transformers.grouped_mm_fallback.default(x, w, o)",
        "f32[3, 16, 8]",
        (0, 2, 1),
    ),
    "unrolled": (
        """a = aten.select.int(w, 0, 0)
    b = aten.select.int(w, 0, 2)
    p = aten.linear.default(x, a)  # experts.0
    q = aten.linear.default(x, b)  # experts.2
    y = aten.add.Tensor(p, q)""",
        "f32[3, 8, 16]",
        (0, 1, 2),
    ),
    "all at once": (
        "u = aten.unsqueeze.default(x, 0)\n    e = aten.expand.default(u, [3, -1, -1])\n    y = aten.bmm.default(e, w)",
        "f32[3, 16, 8]",
        (0, 2, 1),
    ),
}
SPECS = ["int4 sym tensor", "int8 sym channel", "uint4 asym group=4", "int4 sym block=4x8", "int8 sym channel axis=1"]


def program(body: str, kind: str) -> Program:
    import transformers.integrations.moe  # noqa: F401  registers grouped_mm_fallback

    return Program.parse(
        f"def main(x: f32[n, 16], i: i64[n], o: i32[3], *, w: {kind} = 'experts.w'):\n    {body}\n    return {{'y': y}}"
    )


@pytest.mark.parametrize("spec", SPECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_expert_is_a_linear_of_its_own(layout: str, spec: str) -> None:
    body, kind, order = LAYOUTS[layout]
    p = program(body, kind)
    scales = torch.tensor([1.0, 30.0, 0.01]).view(3, 1, 1)  # experts that differ: a shared scale would show
    p.weights["experts.w"] = p.weights["experts.w"] * scales
    stored = p.weights["experts.w"].permute(order)
    assert tuple(stored.shape) == (EXPERTS, OUT, IN)
    expected = torch.stack([QuantSpec.parse(spec).quantize(expert.contiguous()).dequantize() for expert in stored])
    reference = p.clone()
    inverse = [order.index(axis) for axis in range(3)]
    reference.weights["experts.w"] = expected.permute(inverse).contiguous()
    PassManager([InsertQDQ(weights=spec), RTN()]).run(p)
    assert len([k for k in p.weights if k.endswith(".codes")]) == 1
    torch.manual_seed(0)
    ends = torch.tensor([2, 5, 6], dtype=torch.int32)
    feeds = {"x": torch.randn(6, 16), "i": torch.tensor([0, 2, 1, 1, 0, 2]), "o": ends}
    assert torch.allclose(p.run(feeds)["y"], reference.run(feeds)["y"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spec", ["nvfp4", "bfp16", "mx6", "e4m3fn tensor", "e4m3fn no_scale"])
@pytest.mark.parametrize("layout", ["gathered [E, out, in]", "gathered [E, in, out]"])
def test_other_formats_on_stacks(layout: str, spec: str) -> None:
    body, kind, order = LAYOUTS[layout]
    p = program(body, kind)
    p.weights["experts.w"] = p.weights["experts.w"] * torch.tensor([1.0, 1e5, 1e-5]).view(3, 1, 1)
    stored = p.weights["experts.w"].permute(order).contiguous()
    expected = torch.stack([QuantSpec.parse(spec).quantize(expert.contiguous()).dequantize() for expert in stored])
    PassManager([InsertQDQ(weights=spec)]).run(p)
    assert str(Program.parse(str(p))) == str(p)
    PassManager([RTN()]).run(p)
    (node,) = p.calls(torch.ops.qcompile.dequantize.default)
    parts = [p.weights[p.key(n)] if isinstance(n, torch.fx.Node) else n for n in node.args[:3]]
    outer = [p.weights[p.key(n)] for n in p.arg(node, "outer") or []]
    decoded = torch.ops.qcompile.dequantize(*parts, p.arg(node, "spec"), None, outer)
    assert torch.equal(decoded.permute(order), expected)


def test_routers_stay_float_unless_they_are_named() -> None:
    text = """def main(x: f32[n, 16], *, r: f32[3, 16], w: f32[3, 8, 16]):
    l = aten.linear.default(x, r)  # router
    t = aten.topk.default(l, 1)
    i = operator.getitem(t, 1)
    f = aten.view.default(i, [-1])
    g = aten.index.Tensor(w, [f])
    u = aten.unsqueeze.default(x, -1)
    y = aten.bmm.default(g, u)  # experts
    return {"y": y}"""
    p = Program.parse(text)
    (report,) = PassManager([InsertQDQ(weights="int8 sym channel", activations="int8 sym token dynamic")]).run(p)
    assert [(e.where, e.what) for e in report.skipped] == [("router", "stays float (router: null)")]
    (router,) = p.calls(torch.ops.aten.linear.default)
    assert [n.name for n in router.all_input_nodes] == ["x", "r"]
    p = Program.parse(text)
    PassManager([InsertQDQ(router="int8 sym channel"), RTN()]).run(p)
    assert sorted(p.weights) == ["r.codes", "r.scale", "w"]
