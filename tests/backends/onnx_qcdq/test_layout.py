"""A scale's shape becomes ONNX's axis and block size; applied, it dequantizes to the same values."""

from __future__ import annotations

import pytest
import torch

from qcompile.backends.onnx_qcdq import ops
from qcompile.backends.onnx_qcdq.layout import layout_of
from qcompile.numerics.quantize import dequantize
from qcompile.numerics.spec import QuantSpec

SPECS = [
    "int8 sym tensor",
    "int8 sym channel",
    "int8 sym channel axis=1",
    "int4 sym group=8",
    "int4 sym group=4 axis=0",
]
SPECS += ["int4 asym group=24", "int4 asym block=4x8", "int4 asym block=6x1", "uint8 asym channel axis=0,1"]


@pytest.mark.parametrize("text", SPECS)
def test_same_values(text: str) -> None:
    torch.manual_seed(0)
    spec = QuantSpec.parse(text)
    made = spec.quantize(torch.randn(12, 24))
    layout = layout_of((12, 24), made.scale.shape)
    zero = None if made.zero_point is None else layout.apply(made.zero_point)
    values = ops.dequantize_linear(made.codes, layout.apply(made.scale), zero, layout.axis, layout.block_size)
    assert torch.equal(values, dequantize(made.codes, made.scale, made.zero_point, spec))


def test_blocks_of_two_axes_repeat_the_fewest_scales() -> None:
    layout = layout_of((128, 256), (2, 4))
    assert (layout.axis, layout.block_size, layout.shape) == (1, 64, (128, 4))
    assert (layout_of((64, 256), (2, 2)).axis, layout_of((256, 64), (2, 2)).axis) == (1, 0)
    assert layout_of((64, 256), (2, 2), prefer=0).axis == 0


def test_rows_of_a_stack() -> None:
    layout = layout_of((4, 12, 24), (4, 12, 1))
    assert (layout.axis, layout.block_size, layout.shape) == (2, 24, (4, 12, 1))
    assert layout_of((4, 12, 24), (4, 1, 1)).shape == (4,)
