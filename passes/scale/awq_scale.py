"""Scale up the weight columns that matter most, before weights are rounded.

    n = rms_norm(x, γ)                 n = rms_norm(x, γ/s)
    y = linear(n, W)          ⟶        y = linear(n, W·diag(s))

    s = x̄^a / √(max x̄^a · min x̄^a)        x̄_j = mean|n_j|        a: the least of ‖Q(W·diag(s))·diag(1/s)·n − W·n‖²

Exact; it is the rounding that comes after that loses less. AWQ, Lin et al. 2023, section 3.2.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.errors import RecipeError, SpecError
from qcompile.ir.contractions import Contraction, Role, find_contractions
from qcompile.ir.program import Program
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.scale.readers import Reader, Scalable, safe, scalable, tell_left_alone
from qcompile.passes.scale.watch import Sample, Watched, watch
from qcompile.progress import track
from qcompile.recipe.specs import on_weight, weight_spec
from qcompile.spaces import channel_spaces
from qcompile.spaces.apply import Edits


@register
@dataclass(frozen=True)
class AwqScale(CalibratedPass):
    """Scale channels by a power of their mean magnitude, chosen for the output error of rounded weights.

    All products of the counted roles that read a space have one scale, and their errors are summed. Each expert is
    judged on the whole sample. Spaces are judged one by one, with the other weights as they are.

    Memory: `rows` rows of every tensor that a product reads, whatever the number of batches.

    Args:
        spec: how weights will be rounded, written for ``[out, in]`` as in a recipe.
        grid: how many exponents a are tried, evenly from 0 (no scale) to 1.
        rows: how many tokens the error is measured on.
        seed: which tokens.
        roles: products whose weights will be rounded so.

    Raises RecipeError for a bad spec or fewer than two exponents or one row; QCompileError for data without tokens, or
    with nan or infinity on the way.
    """

    name: ClassVar[str] = "awq-scale"
    preserves_function: ClassVar[bool] = True

    spec: str = "int4 asym group=128"
    grid: int = 20
    rows: int = 512
    seed: int = 0
    roles: tuple[Role, ...] = ("linear", "expert")

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        """Scale every space that admits it; every other product is reported with what forbids it."""
        spec = weight_spec(self.spec, "pass 'awq-scale', spec")
        if spec is None or self.grid < 2 or self.rows < 1:
            raise RecipeError(f"pass {self}: give a spec, grid >= 2 and rows >= 1")
        report, spaces, reasons = Report(), channel_spaces(program), dict[fx.Node, str]()
        found = [s for s in scalable(program, spaces, reasons) if self._fits(program, s, spec, reasons)]
        inputs = dict.fromkeys(r.input for s in found for r in self._counted(s))
        samples = {place: Sample(self.rows, self.seed + i) for i, place in enumerate(inputs)}
        tokens = watch(program, samples, batches, report)
        edits = Edits(spaces, report)
        for space in track(found, "choosing scales"):
            space.divide(edits, self._choose(program, space, spec, samples, report))
        edits.commit()
        tell_left_alone(spaces, find_contractions(program), [s.space for s in found], reasons, report)
        report.note(f"{len(inputs)} activations sampled from {tokens} tokens")
        return report

    def _counted(self, found: Scalable) -> list[Reader]:
        return [reader for reader in found.readers if reader.role in self.roles]

    def _fits(self, program: Program, found: Scalable, spec: QuantSpec, reasons: dict[fx.Node, str]) -> bool:
        """Whether the errors of a space can be measured; else every product that reads it gets the reason."""
        reason = next((why for r in self._counted(found) if (why := _obstacle(r.product, spec))), None)
        if not self._counted(found):
            reason = f"it is a {found.readers[0].role}, which is not among roles"
        if reason is not None:
            reasons |= {reader.product.node: reason for reader in found.readers}
        return reason is None

    def _choose(
        self, program: Program, found: Scalable, spec: QuantSpec, samples: Mapping[Watched, Sample], report: Report
    ) -> Tensor:
        """s with the least error, float64 ``[width]``."""
        readers = self._counted(found)
        magnitude = torch.cat([r.of_input(program, samples[r.input].mean) for r in readers]).mean(0)
        errors = torch.zeros(self.grid, dtype=torch.float64)
        exponents = torch.linspace(0, 1, self.grid, dtype=torch.float64).tolist()
        for reader in readers:
            weight, rows = program.weight(reader.product.weight), samples[reader.input].rows
            for i, exponent in enumerate(exponents):
                s = _wide(reader, weight, awq_factors(magnitude, exponent))
                errors[i] += output_error(weight, s, rows, reader.product, spec)
        best = int(errors.argmin())
        report.rewrote(found.space.name, f"exponent {exponents[best]:.3g}: {found.space.width} channels")
        figures = {"exponent": exponents[best], "error": float(errors[0]), "error_after": float(errors[best])}
        report.measure(found.space.name, figures)
        return awq_factors(magnitude, exponents[best])


def awq_factors(magnitude: Tensor, exponent: float) -> Tensor:
    """s of each channel from its mean magnitude, with √(max·min) = 1; 1 for a channel that is always 0."""
    alive = magnitude > 0
    if not bool(alive.any()):
        return torch.ones_like(magnitude)
    powers = magnitude**exponent
    return torch.where(alive, safe(powers / (powers[alive].max() * powers[alive].min()).sqrt()), 1.0)


def output_error(weight: Tensor, s: Tensor, rows: Tensor, product: Contraction, spec: QuantSpec) -> float:
    """Mean over `rows` ``[rows, in]`` of ‖(Q(W·diag(s))·diag(1/s) − W)·x‖², over all experts; `s` ``[in]``."""
    wide = weight if weight.dtype == torch.float64 else weight.float()
    factors = s.to(wide).reshape([-1 if i == product.axis_in else 1 for i in range(wide.ndim)])
    rounded = on_weight(spec, product).quantize(wide * factors).dequantize(wide.dtype) / factors
    order = [i for i in range(wide.ndim) if i not in (product.axis_in, product.axis_out)]
    delta = (rounded - wide).permute(*order, product.axis_in, product.axis_out)
    matrices = delta.reshape(-1, *delta.shape[-2:])
    x = rows.to(wide.dtype)
    return sum(float((x @ matrix).square().sum()) for matrix in matrices) / max(1, len(x))


def _wide(reader: Reader, weight: Tensor, s: Tensor) -> Tensor:
    """Factors of a space along the weight's input axis: 1 for channels of other spaces."""
    wide = torch.ones(weight.shape[reader.product.axis_in], dtype=torch.float64)
    wide[torch.from_numpy(reader.placement.positions)] = s
    return wide


def _obstacle(product: Contraction, spec: QuantSpec) -> str | None:
    """Why the error of a product cannot be measured, or None."""
    if product.kernel or product.groups > 1:
        return f"{product.op} slides a window, which this pass does not simulate"
    if product.weight.meta["val"].shape[product.axis_in] != product.input.meta["val"].shape[product.input_axis]:
        return "it reads a part of a weight"
    try:
        on_weight(spec, product).parameters(product.weight.meta["val"].shape)
    except SpecError as error:
        return str(error)
    return None
