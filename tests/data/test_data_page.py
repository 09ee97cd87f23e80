"""docs/data.md: its Python runs, its tables name every setting and every dataset."""

from __future__ import annotations

import re
from pathlib import Path

from qcompile.data.hub import KNOWN
from qcompile.recipe.model import Calibration

PAGE = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")


def test_the_code_runs() -> None:
    names: dict[str, object] = {}
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        exec(compile(block, "docs/data.md", "exec"), names)


def test_every_setting_and_dataset_is_named() -> None:
    for name in (*Calibration.model_fields, *KNOWN):
        assert re.search(rf"[`{{ ]{name}[`:,]", PAGE), name
