"""Move outliers of activations into the weights that read them.

    n = rms_norm(x, γ)                 n = rms_norm(x, γ/s)
    y = linear(n, W)          ⟶        y = linear(n, W·diag(s))              s_j = max|n_j|^α / max|W_j|^(1-α)

Exact. The factor goes into whatever makes the channels: a norm's gain and bias, the up-projection before a
down-projection, the values before an output projection, a linear before a ReLU. SmoothQuant, Xiao et al. 2023,
equation 4.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, Role, find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.scale.alpha import AlphaRule, Alphas, choose_alphas, common_alpha
from qcompile.passes.scale.insert import Waiting, insert_all, obstacle
from qcompile.passes.scale.readers import (
    QUANTIZED_ROLES,
    Scalable,
    column_peaks,
    covered_positions,
    safe,
    scalable,
    tell_left_alone,
)
from qcompile.passes.scale.watch import Peaks, Watched, watch
from qcompile.spaces import Level, Space, channel_spaces
from qcompile.spaces.apply import Edits
from qcompile.spaces.forest import Ids
from qcompile.spaces.show import account, describe, left_alone


@register
@dataclass(frozen=True)
class Smooth(CalibratedPass):
    """Divide channels by s where they are made, and multiply the weights that read them by s.

    Args:
        alpha: how much of the range of an activation goes into the weights: 0 none, 1 all of it.
        rules: α for products by name, operator, layer or role; null for products that have no say.
        roles: products that count without a rule. A space is smoothed where at least one product that reads it counts.
        insert: where no weight can take up 1/s, multiply by it when the model runs.

    Raises RecipeError for an α outside 0 … 1 or several for the same channels; QCompileError for data without tokens,
    or with nan or infinity on the way.
    """

    name: ClassVar[str] = "smooth"
    preserves_function: ClassVar[bool] = True

    alpha: float = 0.5
    rules: tuple[AlphaRule, ...] = ()
    roles: tuple[Role, ...] = QUANTIZED_ROLES
    insert: bool = False

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        """Smooth every space that a product with an α reads; every other product is reported with what forbids it."""
        report, products = Report(), find_contractions(program)
        alphas = choose_alphas(program, self.alpha, self.rules, self.roles)
        reasons, spaces = dict(alphas.reasons), channel_spaces(program)
        peaks = {(c.input, c.input_axis): Peaks() for c in products if c.node in alphas.of}
        tokens = watch(program, peaks, batches, report)
        report.note(f"{len(peaks)} activations watched over {tokens} tokens")
        chosen = [(s, a) for s in scalable(program, spaces, reasons) if (a := _alpha(s, alphas)) is not None]
        edits = Edits(spaces, report)
        for found, alpha in chosen:
            found.divide(edits, _factors(program, found, alpha, alphas, peaks, report))
        scaled = [found.space for found, _ in chosen]
        fates = {found.space: f"smoothed, alpha {alpha:g}" for found, alpha in chosen}
        for space in spaces[Level.DIAGONAL]:
            if space not in fates:
                fates[space] = left_alone(_why(space, reasons))
        report.spaces = account(spaces, describe(spaces), Level.DIAGONAL, fates)
        online = self._online(program, alphas, covered_positions(scaled), peaks, reasons)
        edits.commit()
        insert_all(program, online, report)
        done = {node for item in online for node in item.nodes}
        tell_left_alone(spaces, [c for c in products if c.node not in done], scaled, reasons, report)
        return report

    def _online(
        self,
        program: Program,
        alphas: Alphas,
        covered: Mapping[fx.Node, Ids],
        peaks: Mapping[Watched, Peaks],
        reasons: dict[fx.Node, str],
    ) -> list[Waiting]:
        """Products whose input is to be multiplied, with the factors: 1 for channels that are folded."""
        if not self.insert:
            return []
        found = []
        for place, products in _by_input(program, alphas).items():
            for product in products:
                if (reason := obstacle(product)) is not None:
                    reasons[product.node] = reason
            fit = [c for c in products if c.node not in reasons]
            alpha = common_alpha(alphas, fit)
            if alpha is None:
                continue
            weights = [column_peaks(program, c.weight, c.axis_in) for c in fit]
            s = smoothing(peaks[place].value, torch.stack(weights).amax(0), alpha)
            for product in fit:
                s[covered.get(product.node, [])] = 1.0
            if bool((s != 1).any()):
                found.append(Waiting(tuple(c.node for c in fit), s))
        return found


def smoothing(activations: Tensor, weights: Tensor, alpha: float) -> Tensor:
    """s of each channel from max |x| and max |W|, float64; 1 where either is 0."""
    s = safe(activations**alpha / weights ** (1 - alpha))
    return torch.where((activations > 0) & (weights > 0), s, 1.0)


def _why(space: Space, reasons: Mapping[fx.Node, str]) -> str:
    """Why a space that may be scaled is not smoothed."""
    if not space.sinks:
        return "no product reads it"
    return next((reasons[p.node] for p in space.sinks if p.node in reasons), "no weight makes it")


def _alpha(found: Scalable, alphas: Alphas) -> float | None:
    return common_alpha(alphas, [reader.product for reader in found.readers])


def _by_input(program: Program, alphas: Alphas) -> dict[Watched, list[Contraction]]:
    groups: dict[Watched, list[Contraction]] = {}
    for product in find_contractions(program):
        if product.node in alphas.of:
            groups.setdefault((product.input, product.input_axis), []).append(product)
    return groups


def _factors(
    program: Program, found: Scalable, alpha: float, alphas: Alphas, peaks: Mapping[Watched, Peaks], report: Report
) -> Tensor:
    """s of a space, from the products that have an α."""
    readers = [r for r in found.readers if r.product.node in alphas.of]
    columns = [column_peaks(program, r.product.weight, r.placement.use.axis) for r in readers]
    weights = torch.stack([r.of_weight(c).amax(0) for r, c in zip(readers, columns, strict=True)]).amax(0)
    activations = torch.stack([r.of_input(program, peaks[r.input].value).amax(0) for r in readers]).amax(0)
    s = smoothing(activations, weights, alpha)
    report.rewrote(found.space.name, f"alpha {alpha:g}: {found.space.width} channels, {len(readers)} products")
    report.measure(found.space.name, {"peak": float(activations.max()), "peak_after": float((activations / s).max())})
    return s
