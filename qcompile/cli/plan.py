"""`qcompile plan`: what a recipe would do, layer by layer, before anything is computed."""

from __future__ import annotations

from qcompile.backend_base import make_backend
from qcompile.cli.show import console, print_json, size
from qcompile.cli.subject import open_program
from qcompile.recipe import Recipe, pipeline, resolve


def run(model: str | None, recipe: str, settings: list[str], target: str | None, as_json: bool) -> None:
    chosen = Recipe.load(recipe).override(settings)
    program = open_program(model)
    plan = resolve(program, chosen)
    passes = [str(p) for p in pipeline(chosen)]
    target = target or chosen.target
    obstacles = [str(o) for o in make_backend(target).obstacles(program)] if target else []
    if as_json:
        print_json({"plan": plan.to_dict(), "passes": passes, "obstacles": obstacles})
        return
    out = console()
    out.print(plan.table())
    out.print(f"size {size(plan.bytes_before)} before, {size(plan.bytes_after)} after", style="bold")
    for index, text in enumerate(passes, 1):
        out.print(f"pass {index}: {text}", markup=False)
    for obstacle in obstacles:
        out.print(f"{target} cannot take {obstacle}", markup=False)
