"""One global scale for weights that read one activation: q, k, v; gate and up. Not exact: the scales move a little.

    g1, g2 = 448·6 / amax(W1), 448·6 / amax(W2)  ⟶  g = min(g1, g2) for both

Runtimes that merge such weights into one matrix (vLLM does) keep one global scale for it. For formats that have one:
NVFP4, or any with `scale=e4m3`. Runs after `insert-qdq` and before a pass that rounds weights.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.numerics.params import choose_qparams
from qcompile.numerics.scale_type import E4M3Scale
from qcompile.pass_base import Pass, Report, register
from qcompile.passes.quantize.sites import QDQ, naming, weight_qdq


@register
@dataclass(frozen=True)
class ShareGlobalScale(Pass):
    """Let weights that read one activation, quantized alike, share their global scale. One weight is read at a time."""

    name: ClassVar[str] = "share-global-scale"
    preserves_function: ClassVar[bool] = False

    def run(self, program: Program) -> Report:
        report = Report()
        places = {p.source: p for p in weight_qdq(program) if p.spec.scale == E4M3Scale()}
        for group in _readers_of_one(program, list(places.values())):
            names = ", ".join(program.key(place.source) for place in group)
            shapes = {place.spec.parameters(place.source.meta["val"].shape)[-1].shape for place in group}
            if len(shapes) > 1:
                report.skip(names, f"their global scales have shapes {sorted(shapes)}, so no one fits all")
                continue
            shared = torch.stack([_global_scale(program, place) for place in group]).amin(0)
            for place in group:
                scale = program.add_weight(f"{program.key(place.source)}.shared_global_scale", shared)
                program.set_arg(place.params, "outer", [scale])
            report.rewrote(names, f"one global scale ({group[0].spec})")
        if not places:
            report.note("no weight has a global scale; nvfp4 and scale=e4m3 have")
        program.refresh()
        return report


def _readers_of_one(program: Program, places: list[QDQ]) -> list[list[QDQ]]:
    """Places with equal specs whose weights multiply one value, where there are several."""
    groups: dict[tuple[fx.Node, str], list[QDQ]] = {}
    for contraction in find_contractions(program):
        for place in places:
            if place.source is contraction.weight:
                group = groups.setdefault((contraction.input, str(place.spec)), [])
                group += [] if place in group else [place]
    return [group for group in groups.values() if len(group) > 1]


def _global_scale(program: Program, place: QDQ) -> Tensor:
    with naming(program.key(place.source)):
        return choose_qparams(program.weight(place.source), place.spec.with_fields({"observer": None})).outer[0]
