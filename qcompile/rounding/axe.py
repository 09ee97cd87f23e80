"""AXE: codes that no input in range can make overflow a narrow accumulator, and the proof."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from qcompile.errors import QCompileError
from qcompile.numerics.element import IntElement
from qcompile.numerics.qtensor import QTensor
from qcompile.rounding.grid import Grid
from qcompile.rounding.shrink import l1_threshold


@dataclass(frozen=True)
class Accumulator:
    """An accumulator of `bits` bits, two's complement without its lowest number, that adds up products of weight codes
    and input codes, `tile` inputs at a time; input codes lie in `input_min` … `input_max`, 0 among them, so that any
    partial sum is bounded by the whole one's worst case.

    As a part of rounding (arXiv 2409.17092, section 3): a column's values are soft-thresholded by the λ of its tile,
    which projects the tile's weights, less their mean, onto the ℓ1 ball of radius (2^bits - 2) / (input_max -
    input_min); then codes are clamped to what is left of the tile's positive and negative budget, which makes overflow
    impossible. Both count as error, which later columns make up for.

    `widen`: scales are first made larger where weights over them would not fit the budget, which costs far less than
    cutting codes off; not in the paper.
    """

    bits: int = 16
    tile: int = 128
    input_min: int = -128
    input_max: int = 127
    widen: bool = False

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 48 or self.tile < 1:
            raise QCompileError(f"{self}: use 2 to 48 bits and tiles of at least one input")
        if not self.input_min <= 0 <= self.input_max or self.input_min == self.input_max:
            raise QCompileError(f"{self}: input codes must have a range with 0 in it")

    @property
    def limit(self) -> int:
        """The largest magnitude of a sum."""
        return (1 << (self.bits - 1)) - 1

    @property
    def radius(self) -> float:
        """What magnitudes of a tile's codes may add up to where negative and positive ones are alike."""
        return 2 * self.limit / (self.input_max - self.input_min)

    def tile_of(self, inputs: int, device: torch.device) -> Tensor:
        """The tile that each input column is in; the last may be short."""
        return torch.arange(inputs, device=device) // self.tile


@dataclass(frozen=True)
class Proof:
    """The worst case of codes against an accumulator, counted exactly in integers: plain values for a manifest.

    `highest` and `lowest` are the extreme sums over all tiles of all outputs and all inputs in range.
    """

    accumulator: str
    outputs: int
    tiles: int
    highest: int
    lowest: int
    limit: int

    @property
    def holds(self) -> bool:
        """Whether no sum leaves -limit … limit."""
        return self.highest <= self.limit and self.lowest >= -self.limit


def prove(codes: Tensor, accumulator: Accumulator) -> Proof:
    """Work out the worst case of weight `codes` [out, in] (int8 or uint8, no zero-point) in int64."""
    rows, inputs = codes.shape
    exact = codes.to(torch.int64)
    tile = accumulator.tile_of(inputs, codes.device).expand(rows, inputs)
    tiles = -(-inputs // accumulator.tile)
    sums = torch.zeros(rows, tiles, dtype=torch.int64, device=codes.device)
    positive = sums.scatter_add(1, tile, exact.clamp(min=0))
    negative = sums.scatter_add(1, tile, exact.clamp(max=0))
    low, high = accumulator.input_min, accumulator.input_max
    highest = int((high * positive + low * negative).max())
    lowest = int((low * positive + high * negative).min())
    return Proof(str(accumulator), rows, tiles, highest, lowest, accumulator.limit)


def widening(columns: Tensor, grid: Grid, accumulator: Accumulator) -> Tensor:
    """[groups, out] ≥ 1: how much larger scales must be for Wᵀ `columns` [in, out] to fit every tile's budget."""
    groups, (rows, _) = len(grid.steps), grid.stored.scales
    codes = (columns / grid.steps[grid.group_of]).abs()
    sums = torch.stack([part.sum(0) for part in torch.split(codes, accumulator.tile)])
    most = (sums.view(groups, -1, sums.shape[1]) if groups > 1 else sums.unsqueeze(0)).amax(1)
    shared = most.view(groups, rows, -1).amax(2, keepdim=True)  # rows that have one scale
    return (shared.expand(groups, rows, columns.shape[1] // rows).reshape(most.shape) / accumulator.radius).clamp(min=1)


class BoundedGrid:
    """A grid whose codes are kept within an accumulator's budget; use one for one recursion."""

    def __init__(self, grid: Grid, accumulator: Accumulator, columns: Tensor) -> None:
        """For Wᵀ `columns` [in, out]; QCompileError where sums of codes are no sums of weights."""
        spec = grid.stored.spec
        if not isinstance(spec.element, IntElement) or not spec.symmetric or spec.via is not None:
            raise QCompileError(f"{spec}: an accumulator bound needs symmetric integer codes; use int4 sym or the like")
        inputs, rows = columns.shape
        group = inputs // len(grid.steps)
        if len(grid.steps) > 1 and group % accumulator.tile:
            raise QCompileError(
                f"{accumulator}: tiles cross groups of {group} inputs; use a tile that divides the group"
            )
        self.grid, self.accumulator = grid, accumulator
        self.running: int | None = None
        self.group_of = grid.group_of
        tile = accumulator.tile_of(inputs, columns.device)
        self._tiles: list[int] = tile.tolist()
        codes = (columns / grid.steps[grid.group_of]).t()
        parts = torch.split(codes, accumulator.tile, dim=1)
        centred = [(part - part.mean(1, keepdim=True)).abs() for part in parts]
        self._softening = torch.stack([l1_threshold(part, accumulator.radius) for part in centred])
        self._positive = torch.zeros(len(parts), rows, dtype=torch.int64, device=columns.device)
        self._negative = torch.zeros_like(self._positive)

    def permuted(self, order: Tensor) -> BoundedGrid:
        """The grid of columns in another order; tiles stay where they are in the stored matrix."""
        moved = object.__new__(BoundedGrid)
        moved.__dict__.update(self.__dict__, grid=self.grid.permuted(order), group_of=self.group_of[order])
        moved._tiles = [self._tiles[j] for j in order.tolist()]
        return moved

    def open(self, first: int, columns: Tensor) -> None:
        """Nothing is chosen on the way."""

    def column(self, x: Tensor, column: int, out: Tensor) -> None:
        """Round `x` [out], the values of one input column, into `out`, and take its codes from the budget."""
        tile = self._tiles[column]
        step = self.grid.steps[self.group_of[column]]
        positive, negative = self._positive[tile], self._negative[tile]
        codes = torch.div(x, step)
        codes = torch.copysign((codes.abs() - self._softening[tile]).clamp_(min=0), codes)
        lowest, highest = self._left(positive, negative)
        spec = self.grid.stored.spec
        found = codes.round_().clamp_(spec.qmin, spec.qmax).to(torch.int64)
        found = torch.minimum(torch.maximum(found, lowest), highest)
        positive.add_(found.clamp(min=0))
        negative.add_(found.clamp(max=0))
        torch.mul(found, step, out=out)

    def finish(self, values: Tensor) -> QTensor:
        """As `Grid.finish`."""
        return self.grid.finish(values)

    def _left(self, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """The lowest and highest code that the tile's worst case leaves room for."""
        low, high, limit = self.accumulator.input_min, self.accumulator.input_max, self.accumulator.limit
        above = limit - (high * positive + low * negative)
        below = limit + (low * positive + high * negative)
        # A positive code adds `high` to the worst case above and `low` to that below; a negative one the other way.
        ups = [room // size for room, size in ((above, high), (below, -low)) if size]
        downs = [room // size for room, size in ((above, -low), (below, high)) if size]
        return -torch.stack(downs).amin(0), torch.stack(ups).amin(0)
