"""Every recipe on the page is carried out on a model, and every `--set` on it does something to the first one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from qcompile import zoo
from qcompile.capture import capture
from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.pass_manager import PassManager
from qcompile.recipe import Recipe, pipeline, resolve

PAGE = (Path(__file__).parents[2] / "docs" / "recipes.md").read_text(encoding="utf-8")
RECIPES = re.findall(r"^```yaml\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
SETTINGS = re.findall(r"--set ([\w.]+=[\w-]+)", PAGE)


@pytest.fixture(scope="module")
def model() -> Program:
    return capture(zoo.path("llama"))


@pytest.mark.parametrize("index", range(len(RECIPES)))
def test_recipes_on_the_page_run(index: int, model: Program) -> None:
    recipe, program = Recipe.parse(RECIPES[index]), model.clone()
    ids = torch.arange(24).view(2, 12)
    before = {"logits": program(ids)}
    plan = resolve(program, recipe)
    PassManager(pipeline(recipe), batches=[ids]).run(program)
    assert not any(program.is_weight(n.args[0]) for n in program.calls(torch.ops.qcompile.quantize.default))
    assert 0 < drift({"logits": program(ids)}, before) < 0.5
    assert plan.bytes_after < plan.bytes_before


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_on_the_page_apply(setting: str) -> None:
    recipe = Recipe.parse(RECIPES[0]).override(["attention=int8 sym token dynamic"])
    assert recipe.override([setting]).check() != recipe


def test_the_page_has_every_field() -> None:
    rows = re.findall(r"^\| `(\w+)`", PAGE, re.MULTILINE)
    assert set(Recipe.model_fields) - {"description"} <= set(rows)
