"""A rotation applies what its matrix says, along any axis, and prints and parses."""

from __future__ import annotations

import pytest
import torch

from qcompile.hadamard import (
    Hadamard,
    HadamardError,
    Learned,
    RandomOrthogonal,
    Rotation,
    orthogonal_from_skew,
    parse_rotation,
)

torch.manual_seed(0)
T = orthogonal_from_skew(torch.randn(24, 24, dtype=torch.float64))
ROTATIONS: list[Rotation] = [
    Hadamard.of(24),
    Hadamard.of(24, signs_seed=3),
    Hadamard(24, 4, 1),
    Hadamard.of(1),
    Hadamard.of(448, 224, signs_seed=5),
    RandomOrthogonal(24, 2),
    Learned("stream", T),
]


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("gradient", [False, True])
def test_applies_its_matrix(rotation: Rotation, axis: int, gradient: bool) -> None:
    shape = [3, 5, 2]
    shape[axis] = rotation.width
    x = torch.randn(shape, dtype=torch.float64, requires_grad=gradient)
    t = rotation.matrix()
    torch.testing.assert_close(t @ t.T, torch.eye(rotation.width, dtype=torch.float64), rtol=0, atol=1e-12)
    for result, dense in ((rotation.apply(x, axis), t), (rotation.apply_inverse(x, axis), t.T)):
        expected = torch.tensordot(dense, x, dims=([1], [axis])).movedim(0, axis)
        assert result.dtype == x.dtype
        assert float((result - expected).detach().abs().max()) <= 1e-12
        assert result.requires_grad == gradient
    assert float((rotation.apply_inverse(rotation.apply(x, axis), axis) - x).detach().abs().max()) <= 1e-12


@pytest.mark.parametrize("rotation", ROTATIONS, ids=str)
def test_prints_and_parses(rotation: Rotation) -> None:
    again = parse_rotation(str(rotation), {"stream": T})
    assert str(again) == str(rotation)
    assert type(again) is type(rotation)
    assert torch.equal(again.matrix(), rotation.matrix())
    assert again == rotation or isinstance(rotation, Learned)


def test_float32() -> None:
    x = torch.randn(24, 7)
    for rotation in ROTATIONS[:3]:
        result = rotation.apply(x, 0)
        assert result.dtype == torch.float32
        torch.testing.assert_close(result.double(), rotation.matrix() @ x.double(), rtol=0, atol=1e-6)


def test_signs_are_random() -> None:
    signs = Hadamard.of(448, signs_seed=0).signs()
    assert signs is not None
    assert set(signs.tolist()) == {-1, 1}
    assert abs(int(signs.sum())) < 100
    assert not torch.equal(signs, Hadamard.of(448, signs_seed=1).signs())  # type: ignore[arg-type]
    assert Hadamard.of(448).signs() is None


def test_random_ones_are_uniform() -> None:
    """Of a uniform T the trace has mean 0 and variance 1, also where QR alone would give a biased sign."""
    traces = torch.stack([RandomOrthogonal(4, seed).matrix().trace() for seed in range(400)])
    assert abs(float(traces.mean())) < 0.2
    assert abs(float(traces.var()) - 1) < 0.3
    assert not torch.equal(RandomOrthogonal(4, 0).matrix(), RandomOrthogonal(4, 1).matrix())


def test_cayley() -> None:
    a = torch.randn(6, 6, dtype=torch.float64, requires_grad=True)
    t = orthogonal_from_skew(a)
    assert float((t @ t.T - torch.eye(6)).detach().abs().max()) <= 1e-13
    assert torch.equal(orthogonal_from_skew(torch.zeros(3, 3)), torch.eye(3))
    assert torch.autograd.gradcheck(orthogonal_from_skew, (a,))
    Learned("r", t).apply(torch.randn(6, 2, dtype=torch.float64), 0).square()[0].sum().backward()
    assert a.grad is not None
    assert float(a.grad.abs().max()) > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int64])
def test_other_dtypes_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(HadamardError, match="cast it to float32 or float64"):
        Hadamard.of(24).apply(torch.zeros(24, dtype=dtype), 0)


def test_sizes_that_do_not_fit() -> None:
    for axis, shape in ((0, (8, 24)), (2, (24, 24))):
        with pytest.raises(HadamardError, match="it must have size 24"):
            Hadamard.of(24).apply_inverse(torch.zeros(shape), axis)
    with pytest.raises(HadamardError, match="no Hadamard matrix of order 18"):
        Hadamard.of(18)
    with pytest.raises(HadamardError, match="must be 1 or more"):
        RandomOrthogonal(0)
    with pytest.raises(HadamardError, match="a square float32 or float64 matrix"):
        Learned("r", torch.zeros(2, 3))
    with pytest.raises(HadamardError, match=r"off the identity; build T with orthogonal_from_skew"):
        Learned("r", torch.full((2, 2), float("nan")))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is no rotation; one starts with hadamard, random, learned"),
        ("hadamar width=4", "did you mean 'hadamard'"),
        ("hadamard", "hadamard takes width="),
        ("hadamard width=4 width=8", "each once"),
        ("random width=4 block=2", "random takes width= and, each once, seed"),
        ("random width=4 seed=x", "'x' is no whole number"),
        ("learned width=4 name=other", r"no such tensor was given; known are: stream \[24, 24\]"),
    ],
)
def test_text_that_says_none(text: str, says: str) -> None:
    with pytest.raises(HadamardError, match=says):
        parse_rotation(text, {"stream": T})
