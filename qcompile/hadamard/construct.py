"""Hadamard matrices: which orders there are, and how each is built.

An order is a Kronecker product of *primitive* matrices and a Sylvester matrix 2^k. Primitive are

- Paley I, order q + 1 for a prime power q ≡ 3 (mod 4), and Paley II, order 2(q + 1) for q ≡ 1 (mod 4)
  (R. E. A. C. Paley, "On orthogonal matrices", 1933);
- four circulants in the array of Goethals and Seidel (`circulants`), for orders that Paley misses.

Artifacts name a matrix by its order alone, so which matrix that is must never change: tests hold digests of them.
"""

from __future__ import annotations

from functools import cache
from math import prod

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.hadamard import circulants
from qcompile.hadamard.field import differences, prime_power

_PASS = 8
"""What one more factor costs, in terms of one more row in a factor: a run over memory."""


class HadamardError(QCompileError):
    """There is no Hadamard matrix of the order, or it does not fit the width that it is asked for."""


def hadamard(order: int) -> Tensor:
    """The matrix H of `order`: int8 [order, order] of ±1, H·Hᵀ = order·I; not to be written to.

    It is the Kronecker product of `factors(order)` in that order. Raises HadamardError where none is known.
    """
    found = factors(order)
    if len(found) > 1:
        return kronecker([hadamard(factor) for factor in found])
    return _sylvester(order) if power_of_two(order) else _primitive(order)


def known(order: int) -> bool:
    """Whether `hadamard(order)` can be built."""
    return order > 0 and _plan(order) is not None


@cache
def factors(order: int) -> tuple[int, ...]:
    """Orders whose matrices' Kronecker product is that of `order`, cheapest to apply: primitive ones, then 2^k.

    ``factors(14336) == (28, 512)``. Raises HadamardError where none is known.
    """
    plan = _plan(order) if order > 0 else None
    if plan is None:
        raise HadamardError(_why_not(order))
    return plan


def base(order: int) -> int:
    """The part of `order` that is not Sylvester's: the product of its primitive factors, 1 for a power of two."""
    return prod(factor for factor in factors(order) if not power_of_two(factor))


def nearest_orders(width: int) -> tuple[int, int]:
    """The largest known order ≤ `width` and the smallest ≥ `width`; both are `width` where it is known."""
    below = next(n for n in range(max(width, 1), 0, -1) if known(n))
    above = max(width, 1)
    while not known(above):
        above += 1
    return below, above


def hadamard_for(width: int, block: int | None = None) -> tuple[int, int]:
    """(order, block) of the operator that transforms `width` channels, in runs of `block` (`width` unless given).

    Raises HadamardError, naming what would do, where `block` does not divide `width` or no matrix of it is known.
    """
    block = width if block is None else block
    if width < 1 or block < 1 or width % block:
        raise HadamardError(
            f"a block of {block} does not divide {width} channels; blocks that would do: {_blocks(width)}"
        )
    return base(block), block


def check_order(order: int, block: int) -> None:
    """Raise HadamardError unless `block` is `order` times a power of two and there is a matrix of `order`."""
    factors(order)
    if block < order or block % order or not power_of_two(block // order):
        way_out = f"use order={base(block)}" if known(block) else _why_not(block)
        raise HadamardError(f"a block of {block} is not {order} times a power of two; {way_out}")


def kronecker(matrices: list[Tensor]) -> Tensor:
    """The Kronecker product of square matrices, left to right."""
    result = matrices[0]
    for matrix in matrices[1:]:
        result = torch.kron(result, matrix)
    return result


def power_of_two(number: int) -> bool:
    """Whether `number` is 1, 2, 4, …"""
    return number > 0 and number & (number - 1) == 0


@cache
def _plan(order: int) -> tuple[int, ...] | None:
    if power_of_two(order):
        return (order,)
    found: list[tuple[int, ...]] = []
    for first in range(4, order + 1, 4):
        if order % first or power_of_two(first) or not _is_primitive(first):
            continue
        rest = _plan(order // first)
        if rest is not None and (power_of_two(rest[0]) or rest[0] <= first):
            found.append((first, *rest) if rest != (1,) else (first,))
    return min(found, key=lambda plan: (_cost(plan), plan), default=None)


def _cost(plan: tuple[int, ...]) -> int:
    """Additions per element; a power of two goes four bits at a time."""
    return sum((n.bit_length() - 1) * (16 + _PASS) // 4 if power_of_two(n) else n + _PASS for n in plan)


@cache
def _is_primitive(order: int) -> bool:
    return _paley_one(order) is not None or _paley_two(order) is not None or circulants.reaches(order)


def _paley_one(order: int) -> tuple[int, int] | None:
    return prime_power(order - 1) if order % 4 == 0 else None


def _paley_two(order: int) -> tuple[int, int] | None:
    return prime_power(order // 2 - 1) if order % 4 == 0 and (order // 2) % 4 == 2 else None


@cache
def _primitive(order: int) -> Tensor:
    if (field := _paley_one(order)) is not None:
        # I + S with S skew: S·Sᵀ = q·I.
        skew = _bordered(differences(*field), below=-1)
        return skew + torch.eye(order, dtype=torch.int8)
    if (field := _paley_two(order)) is not None:
        symmetric = _bordered(differences(*field), below=1)
        one = torch.tensor([[1, 1], [1, -1]], dtype=torch.int8)
        other = torch.tensor([[1, -1], [-1, -1]], dtype=torch.int8)
        return torch.kron(symmetric, one) + torch.kron(torch.eye(order // 2, dtype=torch.int8), other)
    return circulants.build(order)


def _bordered(inner: Tensor, below: int) -> Tensor:
    size = inner.shape[0] + 1
    result = torch.zeros(size, size, dtype=torch.int8)
    result[0, 1:], result[1:, 0], result[1:, 1:] = 1, below, inner
    return result


def _sylvester(order: int) -> Tensor:
    result = torch.ones(1, 1, dtype=torch.int8)
    while result.shape[0] < order:
        result = torch.kron(torch.tensor([[1, 1], [1, -1]], dtype=torch.int8), result)
    return result


def _why_not(order: int) -> str:
    if order < 1:
        return f"no Hadamard matrix of order {order}: an order is 1, 2 or a multiple of 4"
    below, above = nearest_orders(order)
    reason = "an order is 1, 2 or a multiple of 4" if order % 4 else "no construction of it is known here"
    return (
        f"no Hadamard matrix of order {order}: {reason}; widths that would do: {below}, {above}; "
        f"or a block of {_blocks(order)}"
    )


def _blocks(width: int) -> str:
    """The three largest known orders that divide `width`."""
    divisors = [n for n in range(width, 0, -1) if width % n == 0 and known(n)]
    return " or ".join(map(str, divisors[:3])) or "none"
