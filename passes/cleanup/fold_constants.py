"""Compute once what depends on weights alone.

    a = exp(A_log); n = neg(a); y = mul(dt, n)      ⟶      y = mul(dt, A_log.exp.neg)

Exact: the stored value is what the program's own operators give. Left alone: a result or an intermediate of more than
`max_elements` (folding must never bring a second copy of a large weight), a weight that is only moved or cast (its
readers want to know it by its own name), a bare constant such as ``full([], -inf)`` (a literal is worth more to a
backend than a tensor), and every quantization of a weight (the rounding passes' business).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, fx

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.cleanup.constants import Constants


@register
@dataclass(frozen=True)
class FoldConstants(Pass):
    """Replace small computations over weights by stored weights.

    Args:
        max_elements: the largest tensor, result or intermediate, that is folded.
    """

    name: ClassVar[str] = "fold-constants"
    max_elements: int = 1 << 16

    def run(self, program: Program) -> Report:
        """Fold every largest constant subgraph that computes something."""
        report = Report()
        constants = Constants(program, self.max_elements)
        unbounded = Constants(program, 1 << 62)
        for node in program.nodes:
            if node in constants and _is_last(node, constants):
                if not constants.computes(node):
                    continue
                if any(user.op == "output" for user in node.users):
                    report.skip(node, "it is returned, and a returned value stays a call")
                    continue
                weight = constants.fold(node)
                report.rewrote(weight, f"now stored as {program.key(weight)!r}")
            elif node in unbounded and node not in constants and _is_last(node, unbounded) and unbounded.computes(node):
                report.skip(node, f"it is, or is made from, more than max_elements={self.max_elements} elements")
        return report


def _is_last(node: fx.Node, constants: Constants) -> bool:
    """Whether a reader of this tensor depends on the inputs, so that the constant part ends here."""
    return isinstance(node.meta["val"], Tensor) and any(user not in constants for user in node.users)
