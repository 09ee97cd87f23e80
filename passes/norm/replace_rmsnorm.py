"""Replace every spelled-out RMS norm by the operator.

    r = rsqrt(mean(pow(x, 2), -1) + ε)
    y = mul(γ, mul(x, r))                   ⟶      y = rms_norm(x, [d], γ, ε)

Exact in real arithmetic; what it rounds is said in raise-norms, of which this is the part that other tools have under
this name (Brevitas: ``--replace-rmsnorm``, there for module classes with RMS in their name). It leaves layer norms and
l2 norms as they are spelled; raise-norms raises all three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.cleanup.constants import Constants
from qcompile.passes.norm.raise_norms import MAX_WEIGHT, raise_spelled
from qcompile.passes.norm.spelled import SpelledNorm


@register
@dataclass(frozen=True)
class ReplaceRmsNorm(Pass):
    """Turn spelled-out RMS norms, and no other norms, into `aten.rms_norm` with stored weights."""

    name: ClassVar[str] = "replace-rmsnorm"

    def run(self, program: Program) -> Report:
        """Replace each; other norms that are spelled out are reported."""
        report = Report()
        raise_spelled(program, Constants(program, MAX_WEIGHT), report, _other)
        return report


def _other(norm: SpelledNorm) -> str | None:
    if not norm.centred and norm.scale == 1:
        return None
    return f"{'a layer norm' if norm.centred else 'an l2 norm'}; raise-norms raises it"
