"""Orthogonal transformations: Hadamard matrices of any order that can be built, fast, and dense ones."""

from qcompile.hadamard.apply import apply_hadamard, matrix
from qcompile.hadamard.construct import HadamardError, factors, hadamard, hadamard_for, known, nearest_orders
from qcompile.hadamard.op import HADAMARD
from qcompile.hadamard.rotation import (
    Hadamard,
    Learned,
    RandomOrthogonal,
    Rotation,
    apply_matrix,
    orthogonal_from_skew,
    parse_rotation,
)

__all__ = [
    "HADAMARD",
    "Hadamard",
    "HadamardError",
    "Learned",
    "RandomOrthogonal",
    "Rotation",
    "apply_hadamard",
    "apply_matrix",
    "factors",
    "hadamard",
    "hadamard_for",
    "known",
    "matrix",
    "nearest_orders",
    "orthogonal_from_skew",
    "parse_rotation",
]
