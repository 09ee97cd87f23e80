"""Orthogonal transformations T of a width, as values that print, parse and apply to weights.

hadamard width=4096 block=4096 signs=7      T = H·diag(±1), H block-diagonal in runs of `block`; signs= is optional
random width=4096 seed=3                    uniform over the orthogonal group
learned width=4096 name=stream              a tensor, known by its name
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qcompile.errors import nearest
from qcompile.hadamard.apply import apply_hadamard, matrix
from qcompile.hadamard.construct import HadamardError, hadamard_for
from qcompile.hadamard.kernel import Transform, along, along_into, orthonormal

_DTYPES = (torch.float32, torch.float64)
_KINDS = {"hadamard": ("width", "block", "signs"), "random": ("width", "seed"), "learned": ("width", "name")}


class Rotation(ABC):
    """An orthogonal T [width, width]. Applying it makes no temporary tensor beyond a few MiB, unless gradients flow."""

    width: int

    def apply(self, x: Tensor, axis: int) -> Tensor:
        """T·x along `axis`, x_i ← Σ_j T_ij·x_j: a new tensor of x's shape and dtype, float32 or float64.

        ``apply(W, 0)`` is T·W, ``apply(W, 1)`` is W·Tᵀ. Raises HadamardError for another dtype or size.
        """
        self._check(x, axis)
        return self._apply(x, axis, inverse=False)

    def apply_inverse(self, x: Tensor, axis: int) -> Tensor:
        """Tᵀ·x along `axis`; otherwise as `apply`. ``apply_inverse(W, 1)`` is W·T."""
        self._check(x, axis)
        return self._apply(x, axis, inverse=True)

    def apply_into(self, x: Tensor, axis: int, spare: Tensor) -> Tensor:
        """As `apply`, but `x` and `spare`, both contiguous and alike, may be changed, and one may be the result."""
        return self.apply(x, axis)

    @abstractmethod
    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        """T written out, [width, width]."""

    @abstractmethod
    def _apply(self, x: Tensor, axis: int, inverse: bool) -> Tensor: ...

    def _check(self, x: Tensor, axis: int) -> None:
        if x.dtype not in _DTYPES:
            raise HadamardError(
                f"{self}: a tensor in {x.dtype}; cast it to float32 or float64, and round the result once"
            )
        if not -x.dim() <= axis < x.dim() or x.shape[axis] != self.width:
            raise HadamardError(f"{self}: axis {axis} of shape {list(x.shape)}; it must have size {self.width}")


@dataclass(frozen=True)
class Hadamard(Rotation):
    """T = H·diag(s): H the block-diagonal matrix of `qcompile::hadamard`, s of ±1 drawn from a seed, all 1 for None."""

    width: int
    block: int
    signs_seed: int | None = None

    def __post_init__(self) -> None:
        hadamard_for(self.width, self.block)

    @classmethod
    def of(cls, width: int, block: int | None = None, signs_seed: int | None = None) -> Hadamard:
        """With one block for the whole width unless given."""
        return cls(width, width if block is None else block, signs_seed)

    @property
    def order(self) -> int:
        """The `order` of the operator that does the same."""
        return hadamard_for(self.width, self.block)[0]

    def signs(self) -> Tensor | None:
        """s, int8 [width]; None where all are 1."""
        if self.signs_seed is None:
            return None
        return _signs(self.width, self.signs_seed).clone()

    def apply_into(self, x: Tensor, axis: int, spare: Tensor) -> Tensor:
        """As `apply`, in the memory of `x` and `spare` alone."""
        self._check(x, axis)
        if torch.is_grad_enabled() and x.requires_grad:
            return self._apply(x, axis, inverse=False)
        return along_into(x, axis, self._transform(x, inverse=False), spare)

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        repeated = torch.kron(torch.eye(self.width // self.block, dtype=dtype), matrix(self.order, self.block, dtype))
        signs = self.signs()
        return repeated if signs is None else repeated * signs.to(dtype)

    def _apply(self, x: Tensor, axis: int, inverse: bool) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad:
            return self._differentiable(x, axis, inverse)
        return along(x, axis, self._transform(x, inverse))

    def _transform(self, x: Tensor, inverse: bool) -> Transform:
        matrices = orthonormal(self.order, self.block, inverse, x.dtype, x.device)
        signs = None if self.signs_seed is None else _signs(self.width, self.signs_seed).to(x.device, x.dtype)
        return Transform(matrices, None, signs) if inverse else Transform(matrices, signs)

    def _differentiable(self, x: Tensor, axis: int, inverse: bool) -> Tensor:
        signs = None if self.signs_seed is None else _signs(self.width, self.signs_seed).to(x.device, x.dtype)
        last = x.movedim(axis, -1)
        if signs is not None and not inverse:
            last = last * signs
        last = apply_hadamard(last, self.order, self.block, inverse)
        if signs is not None and inverse:
            last = last * signs
        return last.movedim(-1, axis)

    def __str__(self) -> str:
        signs = "" if self.signs_seed is None else f" signs={self.signs_seed}"
        return f"hadamard width={self.width} block={self.block}{signs}"


@dataclass(frozen=True)
class RandomOrthogonal(Rotation):
    """T uniform (Haar) over the orthogonal group: Q of a Gaussian's QR with R's diagonal positive, in float64.

    F. Mezzadri, "How to generate random matrices from the classical compact groups" (2007).
    """

    width: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1:
            raise HadamardError(f"a random rotation of width {self.width}; it must be 1 or more")

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return _haar(self.width, self.seed).to(dtype)

    def _apply(self, x: Tensor, axis: int, inverse: bool) -> Tensor:
        return apply_matrix(_haar(self.width, self.seed), x, axis, inverse)

    def __str__(self) -> str:
        return f"random width={self.width} seed={self.seed}"


@dataclass(frozen=True, eq=False)
class Learned(Rotation):
    """T is `tensor` [width, width], orthogonal to rounding; gradients reach it. See `orthogonal_from_skew`."""

    name: str
    tensor: Tensor

    def __post_init__(self) -> None:
        shape = list(self.tensor.shape)
        if len(shape) != 2 or shape[0] != shape[1] or self.tensor.dtype not in _DTYPES:
            raise HadamardError(
                f"{self.name}: {self.tensor.dtype} {shape}; a rotation is a square float32 or float64 matrix"
            )
        t = self.tensor.detach()
        off = float((t @ t.T - torch.eye(shape[0], dtype=t.dtype, device=t.device)).abs().max()) if shape[0] else 0.0
        if not off <= (1e-4 if t.dtype == torch.float32 else 1e-10):
            raise HadamardError(f"{self.name}: T·Tᵀ is {off:.1e} off the identity; build T with orthogonal_from_skew")

    @property
    def width(self) -> int:  # type: ignore[override]
        return self.tensor.shape[0]

    def matrix(self, dtype: torch.dtype = torch.float64) -> Tensor:
        return self.tensor.to(dtype)

    def _apply(self, x: Tensor, axis: int, inverse: bool) -> Tensor:
        return apply_matrix(self.tensor, x, axis, inverse)

    def __str__(self) -> str:
        return f"learned width={self.width} name={self.name}"


def parse_rotation(text: str, learned: Mapping[str, Tensor] | None = None) -> Rotation:
    """The rotation that `text` is the `str` of; the tensors of learned ones are looked up in `learned` by name.

    Raises HadamardError where the text does not say one, or the tensor is not there.
    """
    kind, *words = text.split() or [""]
    if kind not in _KINDS:
        raise HadamardError(f"{text!r} is no rotation{nearest(kind, _KINDS)}; one starts with {', '.join(_KINDS)}")
    fields = dict(word.partition("=")[::2] for word in words)
    extra = [name for name in fields if name not in _KINDS[kind]]
    if extra or "width" not in fields or len(fields) < len(words):
        raise HadamardError(f"{text!r}: {kind} takes width= and, each once, {', '.join(_KINDS[kind][1:])}")
    width = _number(text, fields["width"])
    if kind == "hadamard":
        signs = fields.get("signs")
        return Hadamard(
            width, _number(text, fields.get("block", str(width))), None if signs is None else _number(text, signs)
        )
    if kind == "random":
        return RandomOrthogonal(width, _number(text, fields.get("seed", "0")))
    name = fields.get("name", "")
    if learned is None or name not in learned or learned[name].shape[:1] != (width,):
        known = ", ".join(f"{key} {list(value.shape)}" for key, value in (learned or {}).items()) or "none"
        raise HadamardError(f"{text!r}: no such tensor was given; known are: {known}")
    return Learned(name, learned[name])


def orthogonal_from_skew(a: Tensor) -> Tensor:
    """Cayley's map of the skew part S = (A − Aᵀ)/2 of `a` [n, n]: (I + S)⁻¹(I − S), orthogonal, the identity at 0.

    Differentiable, in a's dtype; any A will do, and every rotation without eigenvalue −1 is reached.
    """
    skew = (a - a.T) / 2
    eye = torch.eye(a.shape[0], dtype=a.dtype, device=a.device)
    result: Tensor = torch.linalg.solve(eye + skew, eye - skew)
    return result


def apply_matrix(t: Tensor, x: Tensor, axis: int, inverse: bool = False) -> Tensor:
    """`t`·x along an axis (its transpose for the inverse), in x's dtype; gradients reach both."""
    t = (t.T if inverse else t).to(x.device, x.dtype)
    if torch.is_grad_enabled() and (t.requires_grad or x.requires_grad):
        return (x.movedim(axis, -1) @ t.T).movedim(-1, axis)
    return along(x, axis, Transform((t,)))


def _number(text: str, word: str) -> int:
    try:
        return int(word)
    except ValueError as error:
        raise HadamardError(f"{text!r}: {word!r} is no whole number; write one such as 64") from error


@lru_cache(maxsize=16)
def _signs(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 1 - 2 * torch.randint(0, 2, (width,), generator=generator, dtype=torch.int8)


@lru_cache(maxsize=2)
def _haar(width: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    gaussian = torch.randn(width, width, generator=generator, dtype=torch.float64)
    q, r = torch.linalg.qr(gaussian)
    result: Tensor = q * torch.where(r.diagonal() < 0, -1.0, 1.0).to(q.dtype)
    return result
