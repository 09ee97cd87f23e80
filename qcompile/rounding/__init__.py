"""Second-order rounding of one matrix: codes chosen by what they do to a layer's outputs. Linear algebra only."""

from __future__ import annotations

from qcompile.rounding.axe import Accumulator, Proof, prove
from qcompile.rounding.bias import bias_correction
from qcompile.rounding.clip import AwqClip
from qcompile.rounding.factor import Factored, Factors, factor
from qcompile.rounding.figures import Figures
from qcompile.rounding.float_target import FloatTarget, float_target
from qcompile.rounding.gpfq import GPFQ
from qcompile.rounding.gptaq import GPTAQ
from qcompile.rounding.gptq import GPTQ
from qcompile.rounding.grid import Grid, Stored
from qcompile.rounding.magr import MagR
from qcompile.rounding.method import Method, Problem, Sums
from qcompile.rounding.nearest import Nearest
from qcompile.rounding.order import Order, column_order
from qcompile.rounding.qronos import Qronos
from qcompile.rounding.recursion import recurse
from qcompile.rounding.running import RunningGrid
from qcompile.rounding.solve import Rounded, Statistics, round_matrix

__all__ = [
    "GPFQ",
    "GPTAQ",
    "GPTQ",
    "Accumulator",
    "AwqClip",
    "Factored",
    "Factors",
    "Figures",
    "FloatTarget",
    "Grid",
    "MagR",
    "Method",
    "Nearest",
    "Order",
    "Problem",
    "Proof",
    "Qronos",
    "Rounded",
    "RunningGrid",
    "Statistics",
    "Stored",
    "Sums",
    "bias_correction",
    "column_order",
    "factor",
    "float_target",
    "prove",
    "recurse",
    "round_matrix",
]
