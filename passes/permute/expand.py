"""Widen channel spaces by channels that hold zeros.

    W_source [n, in] ← n′ rows, the new ones 0        W_sink [out, n] ← n′ columns, the new ones 0

    y = rms_norm(x, [n], γ, ε)       ⟶       y = rms_norm(x, [n′], γ·√(n/n′), ε·n/n′)

Exact. The mean of squares of x runs over n′ channels of which n′ − n hold 0, so it is n/n′ of what it was. A norm
without a gain hands √(n/n′) to the weights that read it, or is multiplied by it. A width for which there is a Hadamard
matrix lets rotations in; a multiple of a group size lets quantization groups in. What a cache holds stays as wide as it
is: its width is the caller's.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from qcompile.errors import RecipeError
from qcompile.hadamard.construct import factors, known, power_of_two
from qcompile.ir.contractions import Contraction, Embedding, survey
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.permute.kinds import kind_of
from qcompile.passes.permute.widening import Refusal, Widening
from qcompile.spaces import Level, Space, channel_spaces


@register
@dataclass(frozen=True)
class Expand(Pass):
    """Widen spaces to the next good width.

    Args:
        hidden: widen what is between a product and the next one, such as an MLP's intermediate channels.
        stream: widen residual streams, which norms read. center-norm must have made their norms RMS norms.
        to: ``hadamard``: widths of which a Hadamard matrix is known; ``multiple``: multiples of `step`.
        step: with ``hadamard``, how many such widths to go up; null leaves a width that is one already, 1 takes the
            first above it (Brevitas's ``--expansion-step``). With ``multiple``, the number.
        largest_factor: pass over Hadamard matrices that are built of larger ones than this (powers of two aside):
            applying them online costs that many additions a channel.

    Raises RecipeError for a `step` that makes no sense.
    """

    name: ClassVar[str] = "expand"
    hidden: bool = True
    stream: bool = False
    to: Literal["hadamard", "multiple"] = "hadamard"
    step: int | None = None
    largest_factor: int = 172

    def run(self, program: Program) -> Report:
        """Widen; the report has what each space costs, and why others stay as wide as they are."""
        if (self.to == "multiple" and self.step is None) or (self.step is not None and self.step < 1):
            raise RecipeError(f"pass {self}: step={self.step} is no number to step by; give 1 or more")
        report = Report()
        spaces = channel_spaces(program)
        products = {f.node: f for f in survey(program) if isinstance(f, (Contraction, Embedding))}
        total = sum(meta.numel() for meta in (n.meta["val"] for n in program.weight_nodes))
        added = 0
        said: set[tuple[str, str]] = set()
        for space in spaces[Level.PERMUTATION]:
            if space.width == 1 or not space.sinks or not self._chosen(space):
                continue
            width = self.width(space.width)
            widening = Widening(spaces, space, width - space.width, products)
            try:
                if kind_of(space) == "heads":
                    raise Refusal("the width of a head stays: attention, and a cache, say it too")
                if width == space.width:
                    raise Refusal(f"its width {width} is one already")
                widening.decide()
            except Refusal as reason:
                if (space.name, str(reason)) not in said:
                    said.add((space.name, str(reason)))
                    report.skip(space.name, str(reason))
                continue
            before, after = widening.commit()
            added += after - before
            percent = 100 * (after - before) / before
            report.rewrote(space.name, f"{space.width} ⟶ {width} channels, its weights {percent:.1f}% larger")
            report.measure(space.name, {"width": width, "added": after - before, "percent": percent})
        report.note(f"{added} parameters added, {100 * added / max(1, total):.2f}% of the program's")
        return report

    def width(self, width: int) -> int:
        """The width to go to from `width`."""
        if self.to == "multiple":
            assert self.step is not None
            return -(-width // self.step) * self.step
        steps = 0 if self.step is None else self.step
        while steps or not self._good(width):
            width += 1
            steps -= self._good(width) and steps > 0
        return width

    def _good(self, width: int) -> bool:
        if not known(width):
            return False
        return all(power_of_two(factor) or factor <= self.largest_factor for factor in factors(width))

    def _chosen(self, space: Space) -> bool:
        return self.stream if kind_of(space) == "stream" else self.hidden
