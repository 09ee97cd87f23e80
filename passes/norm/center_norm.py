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
from qcompile.passes.norm.affine import tell
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
        for norms, found in _groups(spaces, program.calls(aten.layer_norm.default)):
            sources = [source for space in found for source in space.sources]
            reason = _unfit(spaces, norms, found)
            tell(report, norms, reason, f"an RMS norm now; its mean is folded into {len(sources)} weights")
            if reason is not None:
                continue
            for source in sources:
                edits.centre(source)
            for norm in norms:
                _as_rms(program, norm)
        edits.commit()
        return report


def _groups(spaces: ChannelSpaces, norms: list[fx.Node]) -> list[tuple[list[fx.Node], list[Space]]]:
    """Norms that share what they read, with the spaces they read: one space for a stream, one a head for queries."""
    groups: list[tuple[list[fx.Node], list[Space]]] = []
    for norm in norms:
        found = spaces.spaces_of(norm, "norm", Level.LINEAR) or []
        mine = {id(space) for space in found}
        same = [g for g in groups if mine & {id(space) for space in g[1]}]
        joined = [norm], list(found)
        for group in same:
            groups.remove(group)
            joined = group[0] + joined[0], group[1] + [s for s in joined[1] if id(s) not in {id(t) for t in group[1]}]
        groups.append(joined)
    return groups


def _unfit(spaces: ChannelSpaces, norms: list[fx.Node], found: list[Space]) -> str | None:
    if not found:
        ids = [u.ids for u in spaces.uses if u.node in norms and u.kind == "norm"]
        limits = [limit for i in ids for limit in spaces.limits(Level.LINEAR, i)]
        return "; ".join(dict.fromkeys(map(str, limits))) or "what it reads is no space with weights for sources"
    for p in (p for space in found for p in space.placements):
        if p.use.kind == "norm" and p.node.target is not aten.layer_norm.default:
            return f"{p.node.name} reads the stream too and takes no mean off it"
        if p.use.kind == "norm" and p.node not in norms:
            return f"{p.node.name} reads the stream too and takes a mean over more channels"
        if p.use.kind == "norm" and len(p.positions) > 1:
            return f"several channels of what {p.node.name} reads must move alike"
        if p.use.kind not in ("norm", "source"):
            return f"{p.node.name} reads the stream with its mean ({p.use.kind})"
    return None


def _as_rms(program: Program, norm: fx.Node) -> None:
    """The RMS norm that a layer norm is on what has mean zero, with its bias added behind it."""
    x, shape, weight, bias, eps = (
        program.arg(norm, name) for name in ("input", "normalized_shape", "weight", "bias", "eps")
    )
    result = program.call(aten.rms_norm.default, (x, shape, weight, eps), before=norm)
    if bias is not None:
        result = program.call(aten.add.Tensor, (result, bias), before=norm)
    program.replace(norm, result)
