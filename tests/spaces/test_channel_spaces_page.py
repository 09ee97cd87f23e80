"""docs/channel_spaces.md: what is made from the code is as the code has it now, and its Python runs."""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from qcompile.pass_base import all_passes
from qcompile.spaces import Level
from qcompile.spaces.registry import RULES, TABLE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "channel_spaces.md").read_text()


@pytest.fixture(scope="module")
def script() -> Any:
    spec = importlib.util.spec_from_file_location("channel_spaces_page", ROOT / "benchmarks" / "channel_spaces_page.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def rules() -> Iterator[None]:
    """The table of operators, put back as it was."""
    rows, functions = list(TABLE), dict(RULES)
    yield
    TABLE[:] = rows
    RULES.clear()
    RULES.update(functions)


@pytest.mark.parametrize("part", ["example", "operators"])
def test_what_is_made_is_not_stale(script: Any, part: str) -> None:
    made = script.parts()[part]
    assert script.begin(part) in PAGE
    assert made in PAGE, "run `python benchmarks/channel_spaces_page.py --write`"
    assert script.written(PAGE, script.parts()) == PAGE


def test_every_rule_is_in_the_table(script: Any) -> None:
    made = script.operators().splitlines()
    assert len(made) == 2 + len(script.KINDS) + len(TABLE)
    assert all(row.says.replace("|", "∣") in "\n".join(made) for row in TABLE)


def test_its_python_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rules: None) -> None:
    monkeypatch.chdir(tmp_path)
    for name, text in re.findall(r"^```text (\S+)\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL):
        (tmp_path / name).write_text(text)
    blocks = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    assert len(blocks) == 4
    scope: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block, "channel_spaces.md", "exec", dont_inherit=True), scope)
    assert scope["larger"] in RULES.values()


def test_its_passes_exist() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \| (`\w+`|–) \|", PAGE, re.MULTILINE)
    names = {name for name, level in rows if name not in Level.__members__}
    assert len(names) >= 8
    assert names <= set(all_passes())
    assert {level.strip("`") for name, level in rows if level != "–"} <= set(Level.__members__)
