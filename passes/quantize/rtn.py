"""Round weights to nearest and store the codes. Exact: the program computes the same bits as before.

    c = quantize(W, s, z); linear(x, dequantize(c, s, z))  ⟶  linear(x, dequantize(W.codes, W.scale, W.zero_point))

One weight is in memory at a time.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from qcompile.ir.program import Program
from qcompile.numerics.qtensor import quantize_tensor
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.quantize.sites import given_outer, naming, store_codes, weight_qdq
from qcompile.progress import track


@register
@dataclass(frozen=True)
class RTN(Pass):
    """Round to nearest every weight that `insert-qdq` marked.

    Raises SpecError, with the weight's name, for one that holds nan or infinity, where the format cannot.
    """

    name: ClassVar[str] = "rtn"
    rounds_weights: ClassVar[bool] = True

    def run(self, program: Program) -> Report:
        report = Report()
        for place in track(weight_qdq(program), "rounding weights"):
            key, weight = program.key(place.source), program.weight(place.source)
            with naming(key):
                result = quantize_tensor(weight, place.spec, given_outer(program, place))
            store_codes(program, place, weight, result, report)
            report.rewrote(key, str(place.spec))
        if not report.rewritten:
            report.note("no weight is marked for rounding; insert-qdq, before this pass, marks them")
        return report
