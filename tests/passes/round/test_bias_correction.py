"""Biases that give back what rounding took from the mean of each result."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from qcompile.compiled import CompiledModel
from qcompile.errors import RecipeError
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run

Compiled = Callable[..., CompiledModel]
DATA = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))


def means(program: Program, feeds: dict[str, Tensor]) -> dict[str, Tensor]:
    """The mean over tokens of each product's result, by module."""
    products = {c.node for c in find_contractions(program)}
    found: dict[str, Tensor] = {}

    def observe(node: fx.Node, value: Any) -> None:
        if node in products:
            found[program.module_of(node)] = value.double().flatten(0, -2).mean(0)

    run(program, fill(program, feeds), observe)
    return found


@pytest.mark.parametrize("model", ["qwen3", "gpt2"])
@pytest.mark.parametrize("passes", [["gptq", "bias-correction"], ["bias-correction"]], ids=["gptq", "rtn"])
def test_every_result_has_the_mean_of_the_float_model(compiled: Compiled, passes: list[str], model: str) -> None:
    """Layers behind one that is corrected are corrected for what it does then: nothing is made up for twice."""
    corrected = compiled(passes, model=model, activations="int8 sym token dynamic", weights="int3 sym group=16")
    without = compiled(
        passes[:-1] or ["raise-norms"], model=model, activations="int8 sym token dynamic", weights="int3 sym group=16"
    )
    assert corrected.reference is not None
    wanted = means(corrected.reference, {"input_ids": DATA})
    now, before = means(corrected.program, {"input_ids": DATA}), means(without.program, {"input_ids": DATA})
    report = next(r for r in corrected.report.passes if r.pass_name == "bias-correction")
    for name in wanted:
        if "lm_head" in name:
            continue
        off = (before[name] - wanted[name]).abs().max()
        assert (now[name] - wanted[name]).abs().max() < 0.02 * off, name
    assert len(report.rewritten) == len(wanted) - 1
    assert {e.what.split(": ")[1] for e in report.rewritten} == {"added" if model == "qwen3" else "corrected"}
    assert all(figures["bias_moved"] > 0 for figures in report.measured.values() if "bias_moved" in figures)


def test_padding_does_not_count(compiled: Compiled) -> None:
    import qcompile

    mask = (torch.arange(24) < torch.tensor([[24], [9]])).long()
    data = [{"input_ids": DATA[:2], "attention_mask": mask}]
    float_model = compiled(["gptq", "bias-correction"]).reference
    recipe = {
        "weights": "int3 sym group=16",
        "passes": ["bias-correction"],
        "calibration": {"samples": 2, "length": 24},
    }
    found = qcompile.compile(float_model, recipe, data)
    results: list[dict[str, Tensor]] = []
    for program in (found.program, found.reference):
        assert program is not None
        products, seen = {c.node for c in find_contractions(program)}, {}

        def observe(
            node: fx.Node, value: Any, products: Any = products, program: Any = program, seen: Any = seen
        ) -> None:
            if node in products:
                seen[program.module_of(node)] = value.double()[mask.bool()].mean(0)

        run(program, fill(program, data[0]), observe)
        results.append(seen)
    for name in results[0]:
        if "lm_head" not in name:
            assert torch.allclose(results[0][name], results[1][name], atol=1e-4), name


def test_experts_are_left_alone_with_a_reason(compiled: Compiled) -> None:
    model = compiled(["gptq", "bias-correction"], model="qwen3_moe")
    report = model.report.passes[-1]
    assert any("experts have no bias" in entry.what for entry in report.skipped)


def test_it_takes_layers_one_by_one(compiled: Compiled) -> None:
    with pytest.raises(RecipeError, match=r"take calibration\.true_sequential=true"):
        compiled(["gptq", "bias-correction"], calibration={"true_sequential": False})
