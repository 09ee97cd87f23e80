"""Groups whose parameters are chosen on the way: when the first column of a group is reached, from its columns as they
stand then (arXiv 2210.17323, section 4, "grouping").
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.numerics.fit import work_dtype
from qcompile.numerics.granularity import PerGroup
from qcompile.numerics.parameters import QParams, outer_names
from qcompile.numerics.params import choose_qparams
from qcompile.numerics.qtensor import QTensor
from qcompile.numerics.scale_type import DoubleScale, MicroScale
from qcompile.rounding.grid import Grid, Stored


@dataclass(eq=False)
class RunningGrid:
    """A grid that comes into being group by group, while columns are rounded in order.

    Groups run along the input axis and stay whole under `permuted`. A global scale is fixed at the start, from the
    whole weight, or given as `outer`. Use one for one recursion.
    """

    stored: Stored
    dtype: torch.dtype
    outer: tuple[Tensor, ...]
    group_of: Tensor
    _found: dict[int, Grid] = field(default_factory=dict)

    @classmethod
    def fit(cls, weight: Tensor, stored: Stored, outer: tuple[Tensor, ...] = ()) -> RunningGrid:
        """Made for `weight` [out, in]; QCompileError where the spec's parameters cannot be chosen group by group."""
        if (reason := _impossible(stored)) is not None:
            raise QCompileError(f"{stored.spec}: running groups do not fit, for {reason}; use static groups")
        if not outer and outer_names(stored.spec):
            outer = choose_qparams(stored.tensor(weight), stored.spec).outer
        return cls(stored, work_dtype(weight), outer, stored.group_of(weight.device))

    @property
    def running(self) -> int:
        """Columns in a group: `open` is called with that many before the first of them is rounded."""
        assert isinstance(self.stored.spec.granularity, PerGroup)
        return self.stored.spec.granularity.size

    def permuted(self, order: Tensor) -> RunningGrid:
        """The grid of columns in another order, which must keep each group's columns together."""
        groups = self.group_of[order].view(-1, self.running)
        if bool((groups != groups[:, :1]).any()):
            raise QCompileError("running groups need an order that keeps groups together; use order=group or none")
        # What is found there is found here: groups keep their numbers.
        return RunningGrid(self.stored, self.dtype, self.outer, groups.reshape(-1), self._found)

    def open(self, first: int, columns: Tensor) -> None:
        """Choose parameters for the group of column `first` from its `columns` [group, out]."""
        matrix = columns.t()
        part = Stored(self.stored.spec, self._shape(columns), self.stored.axis_out, self.stored.axis_in)
        params = choose_qparams(part.tensor(matrix), part.spec, self.outer)
        self._found[int(self.group_of[first])] = Grid.of(params, part, self.dtype)
        self._current = self._found[int(self.group_of[first])]

    def column(self, x: Tensor, column: int, out: Tensor) -> None:
        """Round `x` [out], the values of one column of the group that was opened last, into `out`."""
        self._current.column(x, 0, out)

    def finish(self, values: Tensor) -> QTensor:
        """As `Grid.finish`, with the parameters of all groups; every group has been opened."""
        parts = [self._found[group].params for group in range(len(self._found))]
        axis = self.stored.axis_in
        scale = torch.cat([part.scale for part in parts], axis)
        zeros = [part.zero_point for part in parts if part.zero_point is not None]
        params = QParams(scale, torch.cat(zeros, axis) if zeros else None, self.outer)
        return Grid.of(params, self.stored, self.dtype).finish(values)

    def _shape(self, columns: Tensor) -> tuple[int, ...]:
        shape = list(self.stored.shape)
        shape[self.stored.axis_in] = len(columns)
        return tuple(shape)


def _impossible(stored: Stored) -> str | None:
    spec = stored.spec
    granularity = spec.granularity
    if not isinstance(granularity, PerGroup) or granularity.axis % len(stored.shape) != stored.axis_in:
        return "groups do not run along the input axis"
    if isinstance(spec.scale, DoubleScale) or isinstance(spec.zero, DoubleScale):
        return "scales of several groups are quantized together"
    if isinstance(spec.scale, MicroScale):
        return "several groups share an exponent"
    return None
