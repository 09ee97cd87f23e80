"""The operators: schema, fakes, and their way through torch.export and back."""

from __future__ import annotations

import io

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim

import qcompile.ops  # noqa: F401  (registers torch.ops.qcompile)
from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec

SPECS = [
    ("int8 sym token dynamic", ("b", "s", 1)),
    ("int8 asym token dynamic", ("b", "s", 1)),
    ("int8 asym tensor dynamic scale=f16 zero=float", (1, 1, 1)),
    ("int8 sym group=4 dynamic mse", ("b", "s", 4)),
    ("int8 sym channel dynamic percentile=99", (1, 1, 16)),
]


class Simulated(nn.Module):
    """A linear whose weight and input go through quantize and dequantize."""

    def __init__(self, activations: str, weights: str = "int4 asym group=8") -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(6, 16, generator=torch.Generator().manual_seed(0)))
        self.activations, self.weights = activations, weights

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        weight, _ = self.simulate(self.weight, self.weights)
        x, scale = self.simulate(x, self.activations)
        return nn.functional.linear(x, weight), scale

    @staticmethod
    def simulate(x: Tensor, spec: str) -> tuple[Tensor, Tensor]:
        ops = torch.ops.qcompile
        scale, *rest = ops.choose_qparams(x, spec)
        point = rest[0] if rest else None
        codes = ops.quantize(x, scale, point, spec)
        return ops.dequantize(codes, scale, point, spec, dtype=torch.float32), scale


@pytest.mark.parametrize(("spec", "scale_shape"), SPECS)
def test_programs_export_with_dynamic_batch_and_sequence(spec: str, scale_shape: tuple[object, ...]) -> None:
    model = Simulated(spec)
    sizes = {0: Dim("b"), 1: Dim("s")}
    exported = torch.export.export(model, (torch.randn(2, 5, 16),), dynamic_shapes=(sizes,), strict=False)
    calls = [node for node in exported.graph.nodes if node.op == "call_function"]
    chosen = [node for node in calls if node.target == torch.ops.qcompile.choose_qparams.default]
    assert len(chosen) == 2

    placeholder = next(n for n in exported.graph.nodes if n.op == "placeholder" and n.name == "x")
    names = dict(zip(map(str, placeholder.meta["val"].shape), ("b", "s", 16), strict=True))
    found = tuple(names.get(str(size), size) for size in chosen[1].meta["val"][0].shape)
    assert found == scale_shape

    stream = io.BytesIO()
    torch.export.save(exported, stream)
    stream.seek(0)
    reloaded = torch.export.load(stream)
    decomposed = exported.run_decompositions()
    kept = [n for n in decomposed.graph.nodes if n.target == torch.ops.qcompile.quantize.default]
    assert len(kept) == 2
    for shape in ((2, 5, 16), (1, 1, 16), (3, 9, 16)):
        x = torch.randn(shape)
        want = model(x)
        for program in (exported, reloaded, decomposed):
            for got, expected in zip(program.module()(x), want, strict=True):
                assert torch.equal(got, expected)


@pytest.mark.parametrize(
    "text", ["int4 sym group=4", "int8 asym token dynamic", "uint4 asym zero=float scale=bf16 tensor"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_operators_pass_torchs_own_checks(text: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 4, 8).to(dtype)
    ops = torch.ops.qcompile
    scale, *rest = ops.choose_qparams(x, text)
    point = rest[0] if rest else None
    codes = ops.quantize(x, scale, point, text)
    torch.library.opcheck(ops.choose_qparams.default, (x, text))
    torch.library.opcheck(ops.quantize.default, (x, scale, point, text))
    torch.library.opcheck(ops.dequantize.default, (codes, scale, point, text))
    torch.library.opcheck(ops.dequantize.default, (codes, scale, point, text), {"dtype": torch.float16})


def test_operators_are_the_numerics() -> None:
    x = torch.randn(4, 16)
    ops = torch.ops.qcompile
    for text in ("int4 sym group=8", "int4 asym group=8 zero=float"):
        want = QuantSpec.parse(text).quantize(x)
        scale, *rest = ops.choose_qparams(x, text)
        assert torch.equal(scale, want.scale)
        point = None if want.zero_point is None else rest[0]
        assert len(rest) == (want.zero_point is not None)
        assert point is None or torch.equal(point, want.zero_point)
        codes = ops.quantize(x, scale, point, text)
        assert torch.equal(codes, want.codes)
        assert torch.equal(ops.dequantize(codes, scale, point, text), want.dequantize())
        assert ops.dequantize(codes, scale, point, text, torch.float64).dtype == torch.float64


def test_schemas_are_the_documented_ones() -> None:
    assert str(torch.ops.qcompile.choose_qparams.default._schema) == (
        "qcompile::choose_qparams(Tensor x, str spec, Tensor[]? outer=None) -> Tensor[]"
    )
    assert str(torch.ops.qcompile.quantize.default._schema) == (
        "qcompile::quantize(Tensor x, Tensor scale, Tensor? zero_point, str spec, Tensor[]? outer=None) -> Tensor"
    )
    assert str(torch.ops.qcompile.dequantize.default._schema) == (
        "qcompile::dequantize(Tensor codes, Tensor scale, Tensor? zero_point, str spec, "
        "ScalarType? dtype=None, Tensor[]? outer=None) -> Tensor"
    )


def test_errors_come_through() -> None:
    x = torch.randn(2, 10)
    with pytest.raises(SpecError, match="nearest divisors are 2 and 5"):
        torch.ops.qcompile.choose_qparams(x, "int4 group=4")
    with pytest.raises(SpecError, match="did you mean 'sym'"):
        torch.ops.qcompile.choose_qparams(x, "int4 sum")
    with pytest.raises(SpecError, match="ranks must be equal"):
        torch.ops.qcompile.quantize(x.to("meta"), torch.ones(1, device="meta"), None, "int4")
    with pytest.raises(SpecError, match="asym takes one"):
        torch.ops.qcompile.quantize(x.to("meta"), torch.ones(2, 1, device="meta"), None, "int4 asym")
