"""Makes the small programs importable as `calibration.…`, the families as `families.…`."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
