"""Step functions: exact at every step, whatever the levels."""

from __future__ import annotations

import math

import pytest
import torch

from qcompile.errors import SpecError
from qcompile.numerics.staircase import Staircase, nan_mask


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_levels_change_at_the_steps_and_nowhere_else(dtype: torch.dtype) -> None:
    positive = ((0.0, False), (0.1875, True), (0.21875, False), (3.0, True), (2.0**100, False))
    negative = ((2.0**-140, True), (1.0, False))
    stairs = Staircase(positive, negative, (3, 40))
    points = [0.0, 5e-324 if dtype == torch.float64 else 1.4e-45, math.inf, 7e37]
    for step, _ in (*positive, *negative):
        at = torch.tensor(step, dtype=dtype)
        points += [step, *(torch.nextafter(at, torch.tensor(end, dtype=dtype)).item() for end in (0.0, math.inf))]
    for point in points:
        for sign, steps, start in ((1, positive, 3), (-1, negative, 40)):
            expected = start + sum(abs(point) > at or (included and abs(point) == at) for at, included in steps)
            y = torch.copysign(torch.tensor([point], dtype=dtype).abs(), torch.tensor(float(sign)))
            assert stairs(y).item() == expected, (point, sign)


def test_steps_too_near_to_tell_apart_are_refused() -> None:
    stairs = Staircase(((1.0, True), (1.0001, True)), (), (0, 0))
    with pytest.raises(SpecError, match="two thresholds"):
        stairs(torch.ones(1))


def test_nan_mask_tells_nans_from_sums_that_are_none() -> None:
    assert nan_mask(torch.tensor([math.inf, 1.0, -math.inf])) is None
    assert nan_mask(torch.tensor([3e38, 3e38, -math.inf])) is None
    assert nan_mask(torch.empty(0)) is None
    mask = nan_mask(torch.tensor([[0.0, math.nan]]))
    assert mask is not None
    assert mask.tolist() == [[False, True]]
