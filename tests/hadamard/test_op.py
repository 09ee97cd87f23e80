"""The operator means what its dense matrix says: everywhere, in every dtype, exported, and backwards."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qcompile.hadamard import HADAMARD, HadamardError, apply_hadamard, hadamard_for, matrix
from qcompile.hadamard.kernel import Transform, along, orthonormal, split
from qcompile.ir.program import Program

BLOCKS = [1, 2, 8, 12, 64, 128, 144, 256, 448, 512, 1152, 2752, 4096]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("block", BLOCKS)
@pytest.mark.parametrize("inverse", [False, True])
def test_equals_the_dense_matrix(block: int, inverse: bool) -> None:
    order, _ = hadamard_for(block)
    dense = matrix(order, block)
    dense = dense if inverse else dense.T
    x = torch.randn(2, 3, 3 * block, dtype=torch.float64)
    expected = (x.reshape(2, 3, 3, block) @ dense).reshape(x.shape)
    assert float((apply_hadamard(x, order, block, inverse) - expected).abs().max()) <= 1e-12
    assert float((apply_hadamard(expected, order, block, not inverse) - x).abs().max()) <= 1e-12


@pytest.mark.parametrize("shape", [(2, 448, 3), (448, 40), (448, 5000), (3, 448, 2, 2), (0, 448, 3)])
def test_other_axes(shape: tuple[int, ...]) -> None:
    x, axis = torch.randn(shape, dtype=torch.float64), shape.index(448)
    signs = torch.randn(448, dtype=torch.float64)
    matrices = orthonormal(28, 448, False, torch.float64, CPU)
    expected = ((x.movedim(axis, -1) * signs) @ matrix(28, 448).T).movedim(-1, axis)
    torch.testing.assert_close(along(x, axis, Transform(matrices, before=signs)), expected, rtol=0, atol=1e-12)
    expected = ((x.movedim(axis, -1) @ matrix(28, 448).T) * signs).movedim(-1, axis)
    torch.testing.assert_close(along(x, axis, Transform(matrices, after=signs)), expected, rtol=0, atol=1e-12)


def test_many_pieces() -> None:
    x = torch.randn(1500, 896)
    dense = matrix(28, 896)
    result = apply_hadamard(x, 28)
    torch.testing.assert_close(result.double(), x.double() @ dense.T, rtol=0, atol=3e-6)
    turned = apply_hadamard(x.T.contiguous().T, 28)
    assert turned.is_contiguous()
    torch.testing.assert_close(turned, result, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_halves_are_rounded_once(dtype: torch.dtype) -> None:
    x = torch.randn(4, 448).to(dtype)
    result = apply_hadamard(x, 28)
    assert result.dtype == dtype
    assert torch.equal(result, apply_hadamard(x.float(), 28).to(dtype))


def test_shapes() -> None:
    assert apply_hadamard(torch.randn(12), 12).shape == (12,)
    assert apply_hadamard(torch.randn(0, 12), 12).shape == (0, 12)
    assert apply_hadamard(torch.randn(2, 1, 3, 24), 12, 12).shape == (2, 1, 3, 24)
    meta = apply_hadamard(torch.empty(2, 24, device="meta", dtype=torch.bfloat16), 12)
    assert (meta.shape, meta.dtype, meta.device.type) == ((2, 24), torch.bfloat16, "meta")


def test_the_argument_is_left_alone() -> None:
    x = torch.randn(3, 24)
    before = x.clone()
    apply_hadamard(x, 12)
    apply_hadamard(x, 1, 1)
    assert torch.equal(x, before)


def test_library_contract() -> None:
    for order, block in ((12, 24), (1, 4)):
        x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
        torch.library.opcheck(HADAMARD, (x, order, block), {"inverse": True})


def test_gradient() -> None:
    x = torch.randn(2, 24, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: apply_hadamard(t, 12, 12), (x,))
    assert torch.autograd.gradgradcheck(lambda t: apply_hadamard(t, 12, 24, transpose=True), (x,))


class Model(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return apply_hadamard(x, 28, 448) + 1


def test_exports_with_dynamic_sizes() -> None:
    sizes = {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")}
    exported = torch.export.export(Model(), (torch.randn(2, 3, 448),), dynamic_shapes=(sizes,))
    program = Program.from_exported(exported)
    assert "qcompile.hadamard.default(x, 28, 448)" in str(program)
    again = Program.parse(str(program))
    x = torch.randn(5, 1, 448)
    assert torch.equal(again.run({"x": x})[again.output_names[0]], Model()(x))


def test_factors_of_a_block() -> None:
    assert split(28, 14336) == ((28,), (8,), (8,), (8,))
    assert split(1, 4096) == ((16,), (16,), (16,))
    assert split(1, 1024) == ((16,), (8,), (8,))
    assert split(144, 144 * 8) == ((12,), (12,), (8,))
    assert split(12, 96) == ((12, 8),)


@pytest.mark.parametrize(
    ("x", "order", "block", "says"),
    [
        (torch.zeros(2, 30), 12, 12, "a block of 12 does not divide the last axis, 30"),
        (torch.zeros(2, 36), 12, 36, "not 12 times a power of two; use order=36"),
        (torch.zeros(2, 18), 18, 18, "no Hadamard matrix of order 18"),
        (torch.zeros(2, 8, dtype=torch.long), 1, 8, "of torch.int64 of rank 2; it takes floats"),
        (torch.tensor(1.0), 1, 1, "of rank 0"),
    ],
)
def test_errors(x: Tensor, order: int, block: int, says: str) -> None:
    with pytest.raises(HadamardError, match=says):
        apply_hadamard(x, order, block)
    with pytest.raises(HadamardError, match=says):
        apply_hadamard(x.to("meta"), order, block)
