"""Makes families and references importable, and float64 programs of the embedded models."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2]))


@pytest.fixture
def tokens() -> list[torch.Tensor]:
    """Two batches of token ids that every embedded model and family knows."""
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(3, 90, (2, length), generator=generator) for length in (8, 5)]
