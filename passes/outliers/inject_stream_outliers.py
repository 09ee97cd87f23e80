"""Give the residual stream itself a few channels that outgrow the others.

    W_source ← T·W_source        W_sink ← W_sink·Tᵀ          T: principal axes of the stream on calibration data

Exact: T is orthogonal. Most of the energy of a stream lies along few directions; here those directions are channels,
as in large models, where a few channels of the stream have values tens of times those of the others. A norm without
gain does not remove such outliers, and folding does not; another rotation of the stream does.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from qcompile.hadamard.rotation import Learned
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.pass_base import CalibratedPass, Report, register
from qcompile.passes.scale.readers import read_part
from qcompile.passes.scale.watch import Watched, watch
from qcompile.spaces import ChannelSpaces, Level, Space, channel_spaces
from qcompile.spaces.apply import Edits


@register
@dataclass(frozen=True)
class InjectStreamOutliers(CalibratedPass):
    """Rotate every residual stream to the principal axes of what its products read.

    The norms' gains must be folded and LayerNorms centred before: fold-norm-affine, center-norm.

    Args:
        seed: which channel gets which axis.

    Raises QCompileError for data without tokens, or with nan or infinity on the way.
    """

    name: ClassVar[str] = "inject-stream-outliers"
    preserves_function: ClassVar[bool] = True

    seed: int = 0

    def run_calibrated(self, program: Program, batches: Iterable[Tensor]) -> Report:
        """Run the batches once, then rotate; a stream that admits no rotation is reported with the operator."""
        report, spaces = Report(), channel_spaces(program)
        streams = [s for s in spaces[Level.ORTHOGONAL] if s.is_stream]
        _tell_left_alone(spaces, streams, report)
        reads = {space: _reads(program, space) for space in streams}
        moments = {place: SecondMoment() for found in reads.values() for place in found}
        watch(program, moments, batches, report)
        edits = Edits(spaces, report)
        for space, found in reads.items():
            if not found:
                report.skip(space.name, "no product with all of a weight reads it, so its axes are not known")
                continue
            moment = torch.stack([moments[place].of(copy) for place, copies in found.items() for copy in copies]).sum(0)
            energies, axes = torch.linalg.eigh(moment)
            generator = torch.Generator().manual_seed(self.seed)
            edits.rotate(space, Learned("principal-axes", axes.T[torch.randperm(space.width, generator=generator)]))
            shares = {"before": moment.diagonal() / moment.trace(), "after": energies / moment.trace()}
            four = {when: float(share.sort().values[-4:].sum()) for when, share in shares.items()}
            report.rewrote(
                space.name, f"four channels have {four['after']:.0%} of the energy, not {four['before']:.0%}"
            )
            report.measure(space.name, four)
        edits.commit()
        return report


class SecondMoment:
    """XᵀX over all rows, float64 ``[channels, channels]``."""

    def __init__(self) -> None:
        self.value = torch.zeros(0, 0, dtype=torch.float64)

    def see(self, rows: Tensor) -> None:
        """Take in more rows."""
        found = rows.double().T @ rows.double()
        self.value = self.value + found if self.value.numel() else found

    def of(self, channels: Tensor) -> Tensor:
        """The second moment of some channels, in their order."""
        return self.value[channels][:, channels]


def _reads(program: Program, space: Space) -> dict[Watched, Tensor]:
    """Tensors that products read, and where along their channels those of the space are: int64 ``[copies, width]``."""
    by_node = {c.node: c for c in find_contractions(program)}
    found = {}
    for p in space.sinks:
        c = by_node[p.node]
        if c.groups == 1 and read_part(program, c) is None:
            found[c.input, c.input_axis] = torch.from_numpy(p.positions)
    return found


def _tell_left_alone(spaces: ChannelSpaces, streams: list[Space], report: Report) -> None:
    """Report the norms that read a stream which admits no rotation, once for each reason."""
    taken = {p.node for space in streams for p in space.of_kind("norm")}
    said: set[str] = set()
    for use in spaces.uses:
        reasons = "; ".join(str(limit) for limit in spaces.all_limits(Level.ORTHOGONAL, use.ids)[:3])
        reasons = reasons or "its channels stand twice in the weight of a product"
        if use.kind == "norm" and use.node not in taken and reasons not in said:
            said.add(reasons)
            report.skip(use.node, reasons)
