"""Smoothing, equalization and activation-aware scales as their papers write them: plain loops over lists of floats."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

Matrix = Sequence[Sequence[float]]


def smoothquant(activations: Matrix, weights: Sequence[Matrix], alpha: float) -> list[float]:
    """s_j = max|X_j|^α / max|W_j|^(1-α), Xiao et al. 2023, equation 4; `weights` are ``[out][in]`` and read one X."""
    factors = []
    for j in range(len(activations[0])):
        most_x = max(abs(row[j]) for row in activations)
        most_w = max(abs(row[j]) for weight in weights for row in weight)
        factors.append(most_x**alpha / most_w ** (1 - alpha) if most_x > 0 and most_w > 0 else 1.0)
    return factors


def equalize(first: Matrix, second: Matrix) -> list[float]:
    """s_i = √(r1_i·r2_i) / r2_i by which rows of `first` are divided, columns of `second` multiplied, Nagel et al. 2019,
    equation 11."""
    factors = []
    for i in range(len(first)):
        r1, r2 = max(abs(w) for w in first[i]), max(abs(row[i]) for row in second)
        factors.append(math.sqrt(r1 * r2) / r2 if r1 > 0 and r2 > 0 else 1.0)
    return factors


def equalize_chain(matrices: Sequence[Matrix], rounds: int) -> list[list[list[float]]]:
    """Pairs of neighbours in turn, `rounds` times over: the matrices of a chain afterwards."""
    chain = [[list(row) for row in matrix] for matrix in matrices]
    for _ in range(rounds):
        for first, second in itertools.pairwise(chain):
            for i, s in enumerate(equalize(first, second)):
                first[i] = [w / s for w in first[i]]
                for row in second:
                    row[i] *= s
    return chain


def asymmetric(weights: Matrix, bits: int, group: int) -> list[list[float]]:
    """Rounded to nearest with a range from min (at most 0) to max (at least 0) for every `group` weights of a row."""
    result = []
    for row in weights:
        rounded: list[float] = []
        for start in range(0, len(row), group):
            part = row[start : start + group]
            low, high = min(0.0, *part), max(0.0, *part)
            step = (high - low) / (2**bits - 1) or 1.0
            zero = round(-low / step)
            codes = [min(max(round(w / step) + zero, 0), 2**bits - 1) for w in part]
            rounded += [(code - zero) * step for code in codes]
        result.append(rounded)
    return result


def awq(
    activations: Matrix, weights: Sequence[Matrix], points: int, bits: int, group: int
) -> tuple[list[float], list[float]]:
    """The scales, and the error of every exponent, Lin et al. 2023, section 3.2: mean over tokens of
    ‖Q(W·diag(s))·diag(1/s)·x − W·x‖², summed over the weights that read one X."""
    width = len(activations[0])
    mean = [sum(abs(row[j]) for row in activations) / len(activations) for j in range(width)]
    found, errors = [], []
    for point in range(points):
        powers = [m ** (point / (points - 1)) for m in mean]
        middle = math.sqrt(max(powers) * min(powers))
        s = [p / middle for p in powers]
        error = 0.0
        for weight in weights:
            scaled = asymmetric([[w * f for w, f in zip(row, s, strict=True)] for row in weight], bits, group)
            for x in activations:
                for row, exact in zip(scaled, weight, strict=True):
                    terms = zip(row, exact, s, x, strict=True)
                    error += sum((q / f - w) * v for q, w, f, v in terms) ** 2
        found.append(s)
        errors.append(error / len(activations))
    return found[errors.index(min(errors))], errors
