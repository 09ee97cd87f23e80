"""Grids decode to what whole tensors do, in every format, and give back the codes."""

from __future__ import annotations

import pytest
import torch
from rounding_cases import layer

from qcompile.errors import QCompileError
from qcompile.numerics import QuantSpec, choose_qparams, dequantize, quantize
from qcompile.rounding import Grid, RunningGrid, Stored

FORMATS = [
    "int4 sym group=32",
    "int3 sym range=signed",
    "int8 sym tensor",
    "int4 sym channel axis=1",
    "int4 sym block=8x16",
    "int4 asym group=16",
    "uint3 asym group=32 zero=float scale=f16",
    "int4 asym group=16 double=6x8 zero=4x8",
    "int4 sym group=16 double=8x16",
    "ternary sym group=32",
    "e4m3fn channel",
    "e3m2 group=32 scale=pow2",
    "mxfp4(even)",
    "mxint8",
    "nvfp4",
    "nf4 group=32 double=8x16",
    "mx6",
    "bfp16",
    "int4 sym group=32 via=e4m3fn",
    "int6 sym group=32 via=e4m3fn",
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("text", FORMATS)
def test_values_are_those_of_whole_tensors(text: str, dtype: torch.dtype) -> None:
    spec, weight = QuantSpec.parse(text), layer(dtype=dtype).weight
    grid = Grid.fit(weight, Stored.plain(spec, weight))
    # Beyond the range, too: what the recursion asks for is not the weight.
    asked = 1.3 * weight + 0.05
    params = choose_qparams(weight, spec)
    codes = quantize(asked, params.scale, params.zero_point, spec, params.outer)
    expected = dequantize(codes, params.scale, params.zero_point, spec, dtype, params.outer)
    values = grid.round(asked.t().contiguous(), slice(None))
    assert torch.equal(values.t(), expected)
    out = torch.empty_like(values)
    for j in range(len(out)):
        grid.column(asked[:, j].contiguous(), j, out[j])
    assert torch.equal(out, values)
    result = grid.finish(values.t())
    assert torch.equal(result.dequantize(dtype), values.t())
    if spec.via is None:
        same = result.codes == codes
        assert bool((same | (expected == 0)).all())  # zeros have two signs


@pytest.mark.parametrize(("shape", "axes", "text"), [
    ((64, 24), (1, 0), "int4 asym group=16 axis=0"),
    ((64, 24), (1, 0), "int4 sym channel axis=1"),
    ((1, 24, 64), (1, 2), "int4 sym group=32 stack=0"),
    ((64, 1, 24), (2, 0), "int4 sym group=32 axis=0"),
    ((24, 64, 1), (0, 1), "int8 sym channel axis=0"),
])  # fmt: skip
def test_layouts(shape: tuple[int, ...], axes: tuple[int, int], text: str) -> None:
    spec, weight = QuantSpec.parse(text), layer().weight
    stored = Stored(spec, shape, *axes)
    tensor = stored.tensor(weight)
    assert tensor.shape == shape
    assert torch.equal(stored.matrix(tensor), weight)
    grid = Grid.fit(weight, stored)
    result = grid.finish(grid.round(weight.t(), slice(None)).t())
    own = spec.quantize(tensor)
    assert torch.equal(result.codes, own.codes)
    assert torch.equal(result.scale, own.scale)
    groups = len(grid.steps)
    assert grid.steps.shape == (groups, 24)
    assert torch.equal(grid.group_of, torch.arange(64) // (64 // groups))


def test_a_permuted_grid_keeps_each_column_its_group() -> None:
    spec, weight = QuantSpec.parse("int4 asym group=16"), layer().weight
    grid = Grid.fit(weight, Stored.plain(spec, weight))
    order = torch.randperm(64, generator=torch.Generator().manual_seed(1))
    moved = grid.permuted(order).round(weight.t()[order], slice(None))
    assert torch.equal(moved, grid.round(weight.t(), slice(None))[order])
    assert torch.equal(grid.round(weight.t()[5:9], slice(5, 9)), grid.round(weight.t(), slice(None))[5:9])


def test_a_value_between_codes_is_refused() -> None:
    spec, weight = QuantSpec.parse("int4 sym group=16"), layer().weight
    grid = Grid.fit(weight, Stored.plain(spec, weight))
    with pytest.raises(QCompileError, match="none that a code decodes to"):
        grid.finish(weight)


@pytest.mark.parametrize(("text", "axes", "reason"), [
    ("int4 sym channel", (0, 1), "do not run along"),
    ("int4 sym group=4 axis=0", (0, 1), "do not run along"),
    ("nf4 group=32 double=8x16", (0, 1), "quantized together"),
    ("mx6", (0, 1), "share an exponent"),
])  # fmt: skip
def test_running_groups_that_cannot_be(text: str, axes: tuple[int, int], reason: str) -> None:
    weight = layer().weight
    with pytest.raises(QCompileError, match=reason):
        RunningGrid.fit(weight, Stored(QuantSpec.parse(text), (24, 64), *axes))


def test_what_is_no_matrix_is_refused() -> None:
    spec = QuantSpec.parse("int4 sym channel")
    with pytest.raises(QCompileError, match="round its matrices one by one"):
        Stored(spec, (2, 24, 64), 1, 2)
    with pytest.raises(QCompileError, match="not two axes"):
        Stored(spec, (24, 64), 0, 0)
    with pytest.raises(QCompileError, match="nan or infinity"):
        Grid.fit(torch.full((24, 64), torch.nan), Stored(spec, (24, 64), 0, 1))
