"""Finite fields as far as Paley's matrices need them: prime powers, and which differences of elements are squares."""

from __future__ import annotations

from functools import cache
from itertools import product

import torch
from torch import Tensor


@cache
def prime_power(number: int) -> tuple[int, int] | None:
    """(p, k) where `number` is p^k of a prime p and k ≥ 1, else None."""
    if number < 2:
        return None
    p = next((d for d in range(2, int(number**0.5) + 1) if number % d == 0), number)
    power = 0
    while number % p == 0:
        number, power = number // p, power + 1
    return (p, power) if number == 1 else None


def differences(p: int, power: int) -> Tensor:
    """χ(a − b) for all elements a, b of GF(p^power): int8 [q, q] of 1 (a square), −1 (none) and 0 (equal); p is odd.

    Element number i has the digits of i in base p as its coefficients.
    """
    q = p**power
    character = _character(p, power)
    places = torch.tensor([p**k for k in range(power)])
    digits = (torch.arange(q)[:, None] // places) % p
    index = torch.zeros(q, q, dtype=torch.long)
    for k in range(power):
        index += ((digits[:, None, k] - digits[None, :, k]) % p) * places[k]
    return character[index]


def _character(p: int, power: int) -> Tensor:
    """χ of each element, int8 [q]: the even powers of a primitive element are the squares."""
    q = p**power
    for coefficients in product(range(p), repeat=power):
        if coefficients[0] == 0:
            continue
        orbit = _powers(p, coefficients, q - 1)
        if len(set(orbit)) == q - 1:
            character = torch.zeros(q, dtype=torch.int8)
            character[torch.tensor(orbit)] = torch.tensor([1, -1], dtype=torch.int8).repeat((q - 1) // 2)
            return character
    raise AssertionError(f"GF({q}) has a primitive element")


def _powers(p: int, coefficients: tuple[int, ...], count: int) -> list[int]:
    """1, x, x², … modulo x^k − Σ coefficients[i]·x^i as element numbers; cut short where 1 comes back early."""
    element, found = [1] + [0] * (len(coefficients) - 1), []
    for step in range(count):
        number = sum(digit * p**place for place, digit in enumerate(element))
        if step and number == 1:
            break
        found.append(number)
        top = element[-1]
        element = [(low + top * c) % p for low, c in zip([0, *element[:-1]], coefficients, strict=True)]
    return found
