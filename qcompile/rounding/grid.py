"""The values that the columns of a matrix can take: a spec's parameters, chosen once, and rounding with them.

Rounding here is `dequantize(quantize(x))` of `qcompile.numerics`, in the dtype of `x`, one input column at a time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.numerics.fit import work_dtype
from qcompile.numerics.parameters import QParams
from qcompile.numerics.params import choose_qparams
from qcompile.numerics.qtensor import QTensor, quantize_with
from qcompile.numerics.quantize import decoded, round_steps
from qcompile.numerics.spec import QuantSpec


@dataclass(frozen=True)
class Stored:
    """How a matrix [out, in] lies in the tensor that is stored: `axis_out` and `axis_in` of a tensor of `shape` whose
    other axes have size 1. `spec` counts axes of the stored tensor. QCompileError where the axes are not such.
    """

    spec: QuantSpec
    shape: tuple[int, ...]
    axis_out: int
    axis_in: int

    def __post_init__(self) -> None:
        rank, axes = len(self.shape), {self.axis_out, self.axis_in}
        if len(axes) != 2 or not all(0 <= axis < rank for axis in axes):
            problem = f"axis_out={self.axis_out} and axis_in={self.axis_in} are not two axes of {list(self.shape)}"
            raise QCompileError(f"{problem}; count them from 0")
        if any(size != 1 for axis, size in enumerate(self.shape) if axis not in axes):
            problem = f"a tensor of shape {list(self.shape)} is no matrix in axes {self.axis_out} and {self.axis_in}"
            raise QCompileError(f"{problem}; round its matrices one by one")

    @classmethod
    def plain(cls, spec: QuantSpec, weight: Tensor) -> Stored:
        """A matrix that is stored as it is, [out, in]."""
        return cls(spec, tuple(weight.shape), 0, 1)

    @property
    def out_features(self) -> int:
        """Rows of the matrix."""
        return self.shape[self.axis_out]

    @property
    def in_features(self) -> int:
        """Columns of the matrix, along which methods work."""
        return self.shape[self.axis_in]

    @property
    def scales(self) -> tuple[int, int]:
        """How many scales there are along out and along in."""
        shape = self.spec.scale_shape(self.shape)
        return shape[self.axis_out], shape[self.axis_in]

    def group_of(self, device: torch.device) -> Tensor:
        """[in]: the group that each input column is in."""
        return torch.arange(self.in_features, device=device) // (self.in_features // self.scales[1])

    def matrix(self, stored: Tensor) -> Tensor:
        """[out, in] of the stored tensor, or [scales along out, scales along in] of its scale; a view."""
        sizes = stored.shape[self.axis_out], stored.shape[self.axis_in]
        return stored.movedim((self.axis_out, self.axis_in), (-2, -1)).reshape(sizes)

    def tensor(self, matrix: Tensor) -> Tensor:
        """The stored tensor of a matrix [out, in], or of some of its columns; contiguous."""
        sizes = [1] * len(self.shape)
        sizes[self.axis_out], sizes[self.axis_in] = matrix.shape
        ordered = matrix if self.axis_out < self.axis_in else matrix.t()
        return ordered.contiguous().view(sizes)


@dataclass(frozen=True, eq=False)
class Grid:
    """What every input column is rounded to. Make one with `Grid.fit` or `Grid.of`.

    `steps` and `zeros` (None for `sym`): [groups, out], in the dtype of the weight; `group_of` [in]: the group that an
    input column is in; `via` [1, out] or None: the scale of the element that values pass through.
    """

    stored: Stored
    params: QParams
    steps: Tensor
    zeros: Tensor | None
    group_of: Tensor
    via: Tensor | None = None

    @property
    def running(self) -> int | None:
        """None: parameters are known before the first column is rounded."""
        return None

    @classmethod
    def fit(cls, weight: Tensor, stored: Stored, outer: tuple[Tensor, ...] = ()) -> Grid:
        """Parameters from `weight` [out, in] by the spec's own rule; `outer` as in `choose_qparams`.

        Raises SpecError as `choose_qparams` does, QCompileError where the weight is not finite.
        """
        if not bool(torch.isfinite(weight.sum())) and not bool(torch.isfinite(weight).all()):
            raise QCompileError(
                f"the weight to round (shape {list(weight.shape)}) holds nan or infinity; find its source"
            )
        params = choose_qparams(stored.tensor(weight), stored.spec, outer)
        return cls.of(params, stored, work_dtype(weight))

    @classmethod
    def of(cls, params: QParams, stored: Stored, dtype: torch.dtype) -> Grid:
        """The grid of parameters that are known, for values of `dtype` (float32 or float64)."""
        spec = stored.spec
        step, zero, _ = decoded(params, spec, torch.Size(stored.shape), dtype)
        return cls(
            stored,
            params,
            _by_group(step, stored),
            None if zero is None else _by_group(zero, stored),
            stored.group_of(step.device),
            None if spec.via is None else _by_group(params.outer[-1].to(dtype), stored),
        )

    def permuted(self, order: Tensor) -> Grid:
        """The grid of columns in another order: column j of it is column `order[j]` of this one; groups stay put."""
        return replace(self, group_of=self.group_of[order])

    def outputs(self, step: int) -> Grid:
        """The grid of every `step`-th output, to round with; codes are not to be had from it."""
        if step == 1:
            return self
        zeros, via = (t if t is None else t[:, ::step] for t in (self.zeros, self.via))
        return replace(self, steps=self.steps[:, ::step], zeros=zeros, via=via)

    def open(self, first: int, columns: Tensor) -> None:
        """Nothing is chosen on the way."""

    def column(self, x: Tensor, column: int, out: Tensor) -> None:
        """Round `x` [out], the values of one input column, into `out`."""
        step, zero = self._rows[self._groups[column]]
        if self.via is None:
            torch.mul(round_steps(x, step, zero, self.stored.spec), step, out=out)
        else:
            out.copy_(self._rounded(x, step, zero))

    def round(self, x: Tensor, columns: slice | Sequence[int] | Tensor) -> Tensor:
        """Round `x` [k, out], the values of k input columns, to what they decode to."""
        groups = self.group_of[columns]
        return self._rounded(x, self.steps[groups], None if self.zeros is None else self.zeros[groups])

    def finish(self, values: Tensor) -> QTensor:
        """The codes of `values` [out, in], which rounding with this grid gave, in the stored layout.

        Decoding gives exactly `values` back; QCompileError where some entry is no value of the grid.
        """
        wanted = self.stored.tensor(values)
        found = quantize_with(wanted, self.params, self.stored.spec)
        given = found.dequantize(wanted.dtype)
        if not torch.equal(given, wanted):
            wrong = int((given != wanted).sum())
            spec = self.stored.spec
            raise QCompileError(f"{spec}: {wrong} values are none that a code decodes to; pass what rounding gave")
        return found

    @cached_property
    def _rows(self) -> list[tuple[Tensor, Tensor | None]]:
        """Steps and zero-points of each group."""
        zeros = [None] * len(self.steps) if self.zeros is None else self.zeros.unbind(0)
        return list(zip(self.steps.unbind(0), zeros, strict=True))

    @cached_property
    def _groups(self) -> list[int]:
        found: list[int] = self.group_of.tolist()
        return found

    def _rounded(self, x: Tensor, step: Tensor, zero: Tensor | None) -> Tensor:
        spec = self.stored.spec
        if self.via is None or spec.via is None:
            return round_steps(x, step, zero, spec).mul_(step)
        via = self.via.expand_as(x) if x.dim() == 2 else self.via[0]
        values = round_steps(spec.via.round(x / via), step, zero, spec).mul_(step)
        return spec.via.round(values).mul_(via)


def _by_group(scale: Tensor, stored: Stored) -> Tensor:
    """A tensor of a scale's shape as [groups along in, out], repeated where rows share an entry."""
    matrix = stored.matrix(scale)
    rows, groups = matrix.shape
    if rows == 1:
        return matrix.t().expand(groups, stored.out_features)
    return matrix.repeat_interleave(stored.out_features // rows, 0).t().contiguous()
