"""What the documentation says is run: recipes load, Python blocks execute, commands exist."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from qcompile import zoo
from qcompile.recipe import Recipe

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_recipes_in_the_pages_are_recipes(page: Path) -> None:
    for block in blocks(page, "yaml"):
        recipe = Recipe.parse(block).check()
        assert str(Recipe.parse(str(recipe))) == str(recipe)


def test_python_in_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (code,) = blocks(ROOT / "README.md", "python")
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "llama-onnx" / "model.onnx").exists()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_commands_in_the_pages_exist(page: Path) -> None:
    from qcompile.cli.app import app

    known = {c.name or c.callback.__name__ for c in app.registered_commands if c.callback is not None}
    code = "\n".join([*re.findall(r"`([^`\n]+)`", page.read_text()), *blocks(page, "sh"), *blocks(page, "console")])
    used = set(re.findall(r"(?:^|&& |\$ )qcompile ([a-z]+)", code, re.MULTILINE))
    assert used <= known, used - known


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)(?:#[\w-]*)?\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_zoo_is_described() -> None:
    text = (ROOT / "README.md").read_text()
    for name in zoo.NAMES:
        assert f"`zoo:{name}`" in text
