"""Turn layer norms into RMS norms: the mean over channels is folded into whatever adds to the stream.

    x = embedding(ids, E) + linear(h, W, b) + …             E, W, b: less their mean over the channels
    y = layer_norm(x, γ, β)                          ⟶      y = rms_norm(x, γ) + β

Exact: afterwards x has mean zero over its channels, and it only loses what the norm takes off anyway. That holds where
nothing but layer norms reads the stream. The means are taken in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, register
from qcompile.spaces import ChannelSpaces, Level, Space, channel_spaces
from qcompile.spaces.apply import Edits

aten = torch.ops.aten


@register
@dataclass(frozen=True)
class CenterNorm(Pass):
    """Fold the mean of every layer norm into the sources of what it reads."""

    name: ClassVar[str] = "center-norm"

    def run(self, program: Program) -> Report:
        """Centre each space that only layer norms read; the norms that stay are reported with the reason."""
        report = Report()
        spaces = channel_spaces(program)
        edits = Edits(spaces, report)
        waiting = program.calls(aten.layer_norm.default)
        while waiting:
            norm, *waiting = waiting
            space = spaces.space(norm, "norm", Level.LINEAR)
            reason = _unfit(spaces, norm, space)
            if space is None or reason is not None:
                report.skip(norm, reason or "its channels are no one space")
                continue
            for source in space.sources:
                edits.centre(source)
            same = {p.node for p in space.of_kind("norm")}
            for other in [norm, *(n for n in waiting if n in same)]:
                report.rewrote(other, f"an RMS norm now; its mean is folded into {len(space.sources)} weights")
                _as_rms(program, other)
            waiting = [n for n in waiting if n not in same]
        edits.commit()
        return report


def _unfit(spaces: ChannelSpaces, norm: fx.Node, space: Space | None) -> str | None:
    if space is None:
        ids = next((u.ids for u in spaces.uses if u.node is norm), None)
        limits = spaces.limits(Level.LINEAR, ids) if ids is not None else []
        return "; ".join(map(str, limits)) or "what it reads has no weights for sources"
    for p in space.placements:
        if p.use.kind == "norm" and p.node.target is not aten.layer_norm.default:
            return f"{p.node.name} reads the stream too and takes no mean off it"
        if p.use.kind not in ("norm", "source"):
            return f"{p.node.name} reads the stream with its mean ({p.use.kind})"
    return None


def _as_rms(program: Program, norm: fx.Node) -> fx.Node:
    """The RMS norm that a layer norm is on what has mean zero, with its bias added behind it."""
    x, shape, weight, bias, eps = (
        program.arg(norm, name) for name in ("input", "normalized_shape", "weight", "bias", "eps")
    )
    result = program.call(aten.rms_norm.default, (x, shape, weight, eps), before=norm)
    if bias is not None:
        result = program.call(aten.add.Tensor, (result, bias), before=norm)
    program.replace(norm, result)
    return result
