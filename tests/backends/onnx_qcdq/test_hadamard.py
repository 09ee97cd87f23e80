"""Hadamard transforms run in onnxruntime, as products whose factors are stored once."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest
import torch
from onnx_programs import error

from qcompile.backends.onnx_qcdq import OnnxQcdqBackend
from qcompile.ir.program import Program

SIZES = [(1, 8), (12, 24), (28, 448), (1, 4096), (20, 1280), (172, 11008)]


def program(dtype: str, n: int, *transforms: tuple[int, int, bool]) -> Program:
    lines = [f"y{i}: none = qcompile.hadamard.default(x, {o}, {b}, {inv})" for i, (o, b, inv) in enumerate(transforms)]
    returned = ", ".join(f'"y{i}": y{i}' for i in range(len(transforms)))
    text = f"def main(x: {dtype}[batch, sequence, {n}]):\n    " + "\n    ".join(lines) + f"\n    return {{{returned}}}"
    return Program.parse(text)


@pytest.mark.parametrize(("order", "block"), SIZES)
def test_onnxruntime_agrees_with_torch(order: int, block: int, tmp_path: Path) -> None:
    made = program("f32", 2 * block, (order, block, False), (order, block, True))
    backend = OnnxQcdqBackend()
    assert backend.obstacles(made) == []
    backend.lower(made, tmp_path)
    runner = backend.load(tmp_path)
    for shape in ((2, 3), (1, 1)):
        x = torch.randn(*shape, 2 * block)
        results, expected = runner.run({"x": x}), made.run({"x": x})
        assert set(results) == {"y0", "y1"}
        for name, result in results.items():
            assert error(result, expected[name]) <= 1e-6, name


def test_half_precision_is_computed_in_float32(tmp_path: Path) -> None:
    made = program("f16", 448, (28, 448, False))
    OnnxQcdqBackend().lower(made, tmp_path)
    x = torch.randn(2, 3, 448, dtype=torch.float16)
    result = OnnxQcdqBackend().load(tmp_path).run({"x": x})["y0"]
    assert result.dtype == torch.float16
    assert error(result, made.run({"x": x})["y0"]) <= 2**-10


def test_equal_transforms_share_their_factors(tmp_path: Path) -> None:
    same, inverse = (1, 4096, False), (1, 4096, True)
    OnnxQcdqBackend().lower(program("f32", 4096, same, same, inverse), tmp_path)
    model = onnx.load(tmp_path / "model.onnx")
    matrices = [tuple(tensor.dims) for tensor in model.graph.initializer if len(tensor.dims) == 2]
    assert matrices == [(64, 64)] * 4
