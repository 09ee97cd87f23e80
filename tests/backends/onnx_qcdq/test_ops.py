"""Each operator means the same in torch, after conversion in onnxruntime, and to onnx's checker."""

from __future__ import annotations

from pathlib import Path

import onnx
import onnx_ir as ir
import pytest
import torch
from onnx_programs import declare

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.convert import convert
from qcompile.backends.onnx_qcdq.names import rename
from qcompile.backends.onnx_qcdq.prelower import Prelowered
from qcompile.backends.onnx_qcdq.runtime import open_session
from qcompile.ir.program import Program

BODY = """
    q_tensor: none = qcompile_onnx.quantize_linear.default(x, s0, z0, 0, 0, True)
    q_axis: none = qcompile_onnx.quantize_linear.default(x, s1, z1, 2, 0, False)
    q_block: none = qcompile_onnx.quantize_linear.default(x, s2, None, 2, 4, True)
    d_tensor: none = qcompile_onnx.dequantize_linear.default(q_tensor, s0, z0, 0, 0)
    d_axis: none = qcompile_onnx.dequantize_linear.default(q_axis, s1, z1, 2, 0)
    d_block: none = qcompile_onnx.dequantize_linear.default(q_block, s2, None, 2, 4)
    dynamic: none = qcompile_onnx.dynamic_quantize_linear.default(x)
    c: none = operator.getitem(dynamic, 0)
    cs: none = operator.getitem(dynamic, 1)
    cz: none = operator.getitem(dynamic, 2)
    d_dynamic: none = qcompile_onnx.dequantize_linear.default(c, cs, cz, 0, 0)
    product: none = qcompile_onnx.matmul.default(x, w)
    rows: none = qcompile_onnx.gather.default(table, ids)
    halves: none = qcompile_onnx.unpair.default(rows)
    left: none = qcompile_onnx.bit_shift.default(rows, 4, True)
    right: none = qcompile_onnx.bit_shift.default(rows, 6, False)
    clip_all: none = qcompile_onnx.clip.default(x, low, high)
    clip_each: none = qcompile_onnx.clip.default(x, lows, highs)
"""
OUTPUTS = ["q_tensor", "q_axis", "q_block", "d_tensor", "d_axis", "d_block", "c", "d_dynamic", "product", "rows"]
OUTPUTS += ["halves", "left", "right", "clip_all", "clip_each"]


def program() -> Program:
    torch.manual_seed(0)
    weights = {
        "s0": torch.tensor(0.03),
        "z0": torch.tensor(5, dtype=torch.int8),
        "s1": torch.rand(8) * 0.02 + 0.01,
        "z1": torch.randint(100, 150, (8,), dtype=torch.uint8),
        "s2": torch.rand(2, 3, 2) * 0.02 + 0.01,
        "w": torch.randn(8, 5),
        "table": torch.randint(0, 256, (6, 4), dtype=torch.uint8),
        "low": torch.tensor(-0.5),
        "high": torch.tensor(0.75),
        "lows": -torch.rand(1, 1, 8),
        "highs": torch.rand(1, 1, 8),
    }
    declared = ", ".join(declare(name, name, tensor) for name, tensor in weights.items())
    returned = ", ".join(f'"{name}": {name}' for name in OUTPUTS)
    text = f"def main(x: f32[2, 3, 8], ids: i64[2, 3], *, {declared}):{BODY}    return {{{returned}}}"
    return Program.parse(text, weights)


def test_every_operator_is_covered() -> None:
    used = {str(node.target) for node in program().nodes}
    assert {str(getattr(ops, name)) for name in dir(ops) if name.isupper() and name != "NAMESPACE"} <= used


@pytest.mark.parametrize("opset", [21, 23])
def test_onnxruntime_agrees_with_torch(opset: int, tmp_path: Path) -> None:
    source = program()
    model = convert(Prelowered(source, 0, 0, {}, {}, {}), opset)
    rename(model, source, {})
    ir.save(model, tmp_path / "model.onnx")
    onnx.checker.check_model(str(tmp_path / "model.onnx"), full_check=True)
    assert onnx.load(tmp_path / "model.onnx").opset_import[0].version == opset
    feeds = {"x": 3 * torch.randn(2, 3, 8), "ids": torch.randint(0, 6, (2, 3))}
    expected = source.run(feeds)
    results = open_session(tmp_path / "model.onnx").run(None, {name: tensor.numpy() for name, tensor in feeds.items()})
    for name, result in zip(OUTPUTS, results, strict=True):
        ours = torch.from_numpy(result)
        assert ours.dtype == expected[name].dtype, name
        torch.testing.assert_close(ours, expected[name], rtol=1e-6, atol=1e-6, msg=name)


def test_zero_range_quantizes_to_zero() -> None:
    codes, scale, zero = ops.dynamic_quantize_linear(torch.zeros(3))
    assert float(scale) == 1.0
    assert torch.equal(codes, zero.expand(3))
