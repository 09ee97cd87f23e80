"""Rotate the input of every linear layer when the model runs, each by itself.

    z = linear(x, W)          ⟶      z = linear(hadamard(x), W·Tᵀ)

Exact, for any architecture: nothing has to be known of what is between the layers. It costs a transform for each
tensor that linear layers read; `rotate` folds most of them away.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.rotate.inputs import rotate_inputs
from qcompile.passes.rotate.rotate import online_products


@register
@dataclass(frozen=True)
class RotateLayerwise(Pass):
    """Put a Hadamard transform in front of every linear layer and every stack of experts.

    Args:
        block: rotate runs of so many channels by themselves; null for whole tensors.

    Heads, routers and convolutions are left alone, and so is a width that no Hadamard matrix has; the report says so.
    """

    name: ClassVar[str] = "rotate-layerwise"

    block: int | None = None

    def run(self, program: Program) -> Report:
        """Rotate every input."""
        report = Report()
        count = rotate_inputs(program, online_products(program, report, set()), self.block, report)
        report.measure("rotations", {"online": float(count)})
        return report
