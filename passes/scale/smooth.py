"""Move outliers of activations into the weights that read them.

    n = rms_norm(x, γ)                 n = rms_norm(x, γ/s)
    y = linear(n, W)          ⟶        y = linear(n, W·diag(s))              s_j = max|n_j|^α / max|W_j|^(1-α)

Exact. The factor goes into whatever makes the channels: a norm's gain and bias, the up-projection before a
down-projection, the values before an output projection, a linear before a ReLU. SmoothQuant, Xiao et al. 2023,
equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, Role, find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.scale.alpha import AlphaRule, Alphas, choose_alphas, common_alpha
from qcompile.passes.scale.insert import insert_factors, obstacle
from qcompile.passes.scale.readers import (
    QUANTIZED_ROLES,
    Reader,
    Scalable,
    covered_inputs,
    peaks_of_weight,
    safe,
    scalable,
    tell_left_alone,
)
from qcompile.passes.scale.watch import Peaks, Watched, watch
from qcompile.spaces import channel_spaces
from qcompile.spaces.apply import Edits


@register
@dataclass(frozen=True)
class Smooth(CalibratedPass):
    """Divide channels by s where they are made and multiply the weights that read them by s.

    Args:
        alpha: how much of the range of an activation goes into the weights: 0 none, 1 all of it.
        rules: α for products by name, operator, layer or role; null for products that have no say.
        roles: products that count without a rule. What the others read is scaled where one that counts reads it too.
        insert: where no weight can take up 1/s, multiply by it when the model runs.

    Raises RecipeError for an α outside 0 … 1 or several for the same channels; QCompileError for data without tokens
    or with nan or infinity.
    """

    name: ClassVar[str] = "smooth"
    preserves_function: ClassVar[bool] = True

    alpha: float = 0.5
    rules: tuple[AlphaRule, ...] = ()
    roles: tuple[Role, ...] = QUANTIZED_ROLES
    insert: bool = False

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        """Smooth every space that some product with an α reads; the others are reported with what keeps them."""
        report, products = Report(), find_contractions(program)
        alphas = choose_alphas(program, self.alpha, self.rules, self.roles)
        spaces = channel_spaces(program)
        peaks = {(c.input, c.input_axis): Peaks() for c in products if c.node in alphas.of}
        if not peaks:
            report.note("no product has an alpha; nothing is smoothed")
            return report
        tokens = watch(program, peaks, batches)
        found = [(s, a) for s in scalable(program, spaces) if (a := common_alpha(alphas, _products(s))) is not None]
        edits = Edits(spaces, report)
        for space, alpha in found:
            edits.scale(space.space, _fold(program, space, alpha, alphas, peaks, report).reciprocal())
        scaled = [s.space for s, _ in found]
        waiting = _uncovered(program, alphas, scaled, peaks) if self.insert else []
        edits.commit()
        told = dict(alphas.reasons)
        done = {c.node for w in waiting for c in w.products} if self.insert else set()
        for item in waiting:
            done -= _insert(program, item, report, told)
        tell_left_alone(spaces, [c for c in products if c.node not in done], scaled, told, report)
        report.note(f"{len(peaks)} activations watched over {tokens} tokens")
        return report
