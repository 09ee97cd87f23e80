"""Fold a norm's gain and bias into whatever reads the norm.

    y = rms_norm(x, γ)             ⟶      y = rms_norm(x)
    z = linear(y, W, b)                   z = linear(y, W·diag(γ), b)

    y = layer_norm(x, γ, β)               y = layer_norm(x)
    z = linear(y, W, b)            ⟶      z = linear(y, W·diag(γ), b + W·β)

Exact. Afterwards nothing scales the channels between the norm and its readers, and rotations may pass. A gain is
folded where all that its channels meet are weights of products; a reader without a bias gets one where β asks for it.
Where a reader can have none (experts, convolutions), or reads a multiple, the bias stays on the norm as β/γ. A bias
without a gain is folded as one beside a gain of 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, fx

from qcompile.ir.bias import add_to_bias
from qcompile.ir.contractions import Contraction, find_contractions
from qcompile.ir.edits import AlongAxis
from qcompile.ir.moves import moved
from qcompile.ir.program import Program
from qcompile.pass_base import Pass, Report, place, register
from qcompile.passes.norm.affine import NORMS, affine, computed, tell
from qcompile.spaces import ChannelSpaces, Level, Placement, Space, channel_spaces
from qcompile.spaces.apply import Edits
from qcompile.spaces.forest import Ids

aten = torch.ops.aten
_SMALLEST = 1e-6  # of the largest gain: what is divided by less would grow out of proportion


@register
@dataclass(frozen=True)
class FoldNormAffine(Pass):
    """Fold γ and β of every norm into its readers, where its readers are products with weights."""

    name: ClassVar[str] = "fold-norm-affine"

    def run(self, program: Program) -> Report:
        """Fold each norm; those that stay are reported with the operator that keeps them."""
        report = Report()
        lent = _lend_gains(program)
        spaces = channel_spaces(program)
        edits = Edits(spaces, report)
        products = {c.node: c for c in find_contractions(program)}
        gains: dict[fx.Node, list[fx.Node]] = {}
        for norm in program.calls(*NORMS):
            if (reason := computed(program, norm)) is not None:
                report.skip(norm, reason)
            elif vectors := affine(program, norm):
                gains.setdefault(vectors[0], []).append(norm)
        for norms in gains.values():
            reason = _fold(program, norms, spaces, edits, products, lent, report)
            tell(report, norms, reason, "folded into what reads it")
        edits.commit()
        for norm in program.calls(*NORMS):
            if program.arg(norm, "weight") in lent:
                program.set_arg(norm, "weight", None)
        return report


def _lend_gains(program: Program) -> set[fx.Node]:
    """Give norms that have a bias only a gain of 1 for as long as the pass runs; one for each bias."""
    lent: dict[fx.Node, fx.Node] = {}
    for norm in program.calls(aten.layer_norm.default):
        bias = program.arg(norm, "bias")
        if program.arg(norm, "weight") is None and program.is_weight(bias):
            if bias not in lent:
                key = f"{program.key(bias)}.gain"
                while key in program.weights:
                    key += "_"
                value = bias.meta["val"]
                ones = torch.ones(value.shape, dtype=value.dtype)
                lent[bias] = program.add_weight(key, ones, module=program.module_of(norm))
            program.set_arg(norm, "weight", lent[bias])
    return set(lent.values())


def _fold(
    program: Program,
    norms: list[fx.Node],
    spaces: ChannelSpaces,
    edits: Edits,
    products: dict[fx.Node, Contraction],
    lent: set[fx.Node],
    report: Report,
) -> str | None:
    """Fold norms that share a gain; the reason why they are left alone otherwise."""
    vectors = affine(program, norms[0])
    space = spaces.space(vectors[0], "source", Level.DIAGONAL)
    if space is None:
        use = next((u for u in spaces.uses if u.node is vectors[0]), None)
        limits = spaces.limits(Level.DIAGONAL, use.ids) if use is not None else []
        return "; ".join(map(str, limits)) or "its channels do not all meet the same weights"
    if any(affine(program, norm) != vectors for norm in norms):
        return "it shares its gain with a norm that has another bias"
    if (reason := _unfit(space, vectors, norms, spaces, products)) is not None:
        return reason
    gain = program.weight(vectors[0])
    shift = vectors[1] if len(vectors) > 1 else None
    stays = next((why for sink in space.sinks if (why := _no_bias(program, products[sink.node], sink, norms))), None)
    goes = stays is None
    if shift is not None and not goes:
        if vectors[0] in lent:
            return f"it has no gain to fold, and its bias stays: {stays}"
        if not bool((gain.abs() > gain.abs().max() * _SMALLEST).all()):
            return f"its bias would have to stay, for {stays}; and it cannot: a gain is zero"
        report.note(f"{place(norms[0])} keeps its bias: {stays}")
        program.edit_weight(shift, AlongAxis(0, _Divided(gain)))  # n·γ + β = (n + β/γ)·γ
    for sink in space.sinks:
        if shift is not None and goes:
            c = products[sink.node]
            add_to_bias(program, c, _shift_of(program, c, program.weight(shift), sink.positions[0]))
        if vectors[0] not in lent:
            edits.multiply(sink, gain)
    for norm in norms:
        program.set_arg(norm, "weight", None)
        if shift is not None and goes:
            program.set_arg(norm, "bias", None)
    return None


@dataclass(frozen=True, eq=False)
class _Divided:
    by: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        return vectors / self.by.to(vectors)


def _no_bias(program: Program, c: Contraction, sink: Placement, norms: list[fx.Node]) -> str | None:
    """Why W·β cannot go to the bias of a product, or None."""
    if sink.positions.shape[0] > 1:
        return f"{c.node.name} reads channels several times"
    if c.kernel or c.experts is not None:
        return f"{c.node.name} has no one bias for all that it computes"
    read = c.input
    while read not in norms:  # a factor on the way would act on β as well, and another for each token
        source = moved(program, read)
        if source is None:
            return f"{read.name} computes what {c.node.name} reads"
        read = source
    return None


def _unfit(
    space: Space,
    vectors: list[fx.Node],
    norms: list[fx.Node],
    spaces: ChannelSpaces,
    products: dict[fx.Node, Contraction],
) -> str | None:
    kinds = ("sink",) if len(vectors) > 1 else ("sink", "state")  # a cache may hold its values without the gain
    others = [p for p in space.placements if not (p.use.kind in kinds or p.node in vectors)]
    if others:
        return f"its channels also meet {others[0].node.name}, which is no product that reads them"
    if any(p.positions.shape[0] > 1 for p in space.sources):
        return "some of its channels must move alike"
    if not space.sinks:
        return "nothing that reads it is a product with a weight"
    for sink in space.sinks:
        wires = sink.use.ids[sink.positions.ravel()]
        for limit in spaces.all_limits(Level.LINEAR, wires):
            if limit.node not in norms:
                return f"between it and {sink.node.name}, {limit}"
    return None


def _shift_of(program: Program, c: Contraction, shift: Tensor, positions: Ids) -> Tensor:
    """W·β ``[output features]``, float64."""
    weight = program.weight(c.weight).double().movedim(c.axis_in, -1)
    return weight[..., torch.from_numpy(positions)] @ shift.double()
