"""Hadamard matrices of order 4t from four t × t matrices over an abelian group, in the array of Goethals and Seidel.

With A·Aᵀ + B·Bᵀ + C·Cᵀ + D·Dᵀ = 4t·I, all four developed over the group, and R the reversal x ↦ −x of its elements:

    ⎡  A    BR    CR    DR ⎤
    ⎢ −BR   A     DᵀR  −CᵀR⎥
    ⎢ −CR  −DᵀR   A     BᵀR⎥
    ⎣ −DR   CᵀR  −BᵀR   A  ⎦

(Goethals, Seidel, "A skew Hadamard matrix of order 36", 1970). Where the four come from is in `sequences`: cosets, or
T-sequences of length m, of which exactly one is ±1 at each place, put together with Williamson's four of order w;
t = m·w (Cooper, Wallis, "A construction for Hadamard arrays", 1972).
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

from qcompile.hadamard.sequences import BASE, COSETS, TURYN_TYPE, WILLIAMSON

_SIGN = {"+": 1, "-": -1}


def reaches(order: int) -> bool:
    """Whether `build` knows the order."""
    return order % 4 == 0 and (order // 4 in COSETS or _split(order // 4) is not None)


def build(order: int) -> Tensor:
    """A Hadamard matrix of `order`, one that `reaches` says yes to: int8 [order, order] of ±1."""
    t = order // 4
    if t in COSETS:
        four = [circulant(row) for row in coset_rows(t)]
        return goethals_seidel(four, circulant_reversal(t))
    split = _split(t)
    assert split is not None
    m, w = split
    t1, t2, t3, t4 = (circulant(row) for row in t_sequences(m))
    a, b, c, d = (circulant(row) for row in williamson_rows(w))
    kron = torch.kron
    four = [
        kron(t1, a) + kron(t2, b) + kron(t3, c) + kron(t4, d),
        -kron(t1, b) + kron(t2, a) + kron(t3, d) - kron(t4, c),
        -kron(t1, c) - kron(t2, d) + kron(t3, a) + kron(t4, b),
        -kron(t1, d) + kron(t2, c) - kron(t3, b) + kron(t4, a),
    ]
    return goethals_seidel(four, kron(circulant_reversal(m), circulant_reversal(w)))


def goethals_seidel(four: list[Tensor], reversal: Tensor) -> Tensor:
    """The array of the file's first lines; all [t, t]."""
    a, b, c, d = four
    order = reversal.argmax(0)

    def flip(matrix: Tensor) -> Tensor:
        return matrix[:, order]

    rows = [
        [a, flip(b), flip(c), flip(d)],
        [-flip(b), a, flip(d.T), -flip(c.T)],
        [-flip(c), -flip(d.T), a, flip(b.T)],
        [-flip(d), flip(c.T), -flip(b.T), a],
    ]
    return torch.cat([torch.cat(row, 1) for row in rows])


def circulant(row: list[int]) -> Tensor:
    """int8 [t, t] with entry (i, j) = row[j − i]."""
    places = torch.arange(len(row))
    return torch.tensor(row, dtype=torch.int8)[(places[None, :] - places[:, None]) % len(row)]


def circulant_reversal(t: int) -> Tensor:
    """int8 [t, t], 1 where i + j ≡ 0."""
    return circulant([1] + [0] * (t - 1))[:, (-torch.arange(t)) % t]


def coset_rows(t: int) -> list[list[int]]:
    """Four rows ±1 of length `t`, a prime of `COSETS`."""
    generator, count, chosen = COSETS[t]
    place = {pow(generator, i, t): i % count for i in range(t - 1)}
    return [[-1 if place.get(x) in negative else 1 for x in range(t)] for negative in chosen]


def williamson_rows(w: int) -> list[list[int]]:
    """Four symmetric rows ±1 of length `w`, an order of `WILLIAMSON`."""
    halves = [[_SIGN[c] for c in half] for half in WILLIAMSON[w].split()]
    return [half + half[:0:-1] for half in halves]


@cache
def t_sequences(m: int) -> list[list[int]]:
    """Four rows of 1, 0 and −1 of length `m`, one of them not 0 at each place, whose autocorrelations sum to 0."""
    if m <= 3:
        return [[int(i == place) for place in range(m)] for i in range(4)]
    a, b, c, d = _base_sequences(m)
    before, after = [0] * len(a), [0] * len(c)
    plus, minus = [(x + y) // 2 for x, y in zip(a, b, strict=True)], [(x - y) // 2 for x, y in zip(a, b, strict=True)]
    more, less = [(x + y) // 2 for x, y in zip(c, d, strict=True)], [(x - y) // 2 for x, y in zip(c, d, strict=True)]
    return [plus + after, minus + after, before + more, before + less]


def _base_sequences(m: int) -> list[list[int]]:
    if (m + 1) // 2 in BASE and m % 2:
        return [[_SIGN[c] for c in row] for row in BASE[(m + 1) // 2].split()]
    digits = [int(digit, 16) for digit in TURYN_TYPE[(m + 1) // 3]]
    digits[-1] <<= 1
    x, y, z, w = ([1 - 2 * (digit >> bit & 1) for digit in digits] for bit in (3, 2, 1, 0))
    return [z + w[:-1], z + [-value for value in w[:-1]], x, y]


@cache
def lengths() -> tuple[int, ...]:
    """The lengths that `t_sequences` knows."""
    return tuple(sorted({1, 3, *(2 * n - 1 for n in BASE), *(3 * n - 1 for n in TURYN_TYPE)}))


@cache
def _split(t: int) -> tuple[int, int] | None:
    """(m, w) with m·w = t, T-sequences of length m and Williamson matrices of order w, the smallest w there is."""
    return next(((t // w, w) for w in sorted(WILLIAMSON) if t % w == 0 and t // w in lengths()), None)
