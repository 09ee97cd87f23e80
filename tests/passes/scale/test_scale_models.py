"""Every scaling pass keeps the function of whole models: the embedded ones, and families that differ in structure."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import pytest
import torch
from families import captured
from torch import Tensor

from qcompile import capture, run_passes
from qcompile.drift import Drift, drift, observe
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.pass_base import Report, parse_pipeline
from qcompile.pass_manager import PassManager
from qcompile.zoo import path

ALL_ROLES = "roles=[linear, expert, convolution, head, router]"
PASSES = [
    f"smooth({ALL_ROLES})",
    f"smooth(alpha=0.8, insert=true, {ALL_ROLES})",
    "equalize",
    "equalize(norms=true, measure=rms)",
    "awq-scale(spec=int4 asym group=8, rows=12, grid=4)",
]
CHAIN = ", ".join(PASSES[1:])
FAMILIES = ["gpt2", "gemma2", "falcon", "bert"]


@cache
def made(name: str) -> Program:
    program = captured.capture_family(name).program
    run_passes(program, "raise-norms")
    return program


@cache
def single() -> Program:
    program = capture(path("llama"), dtype=torch.float32)
    run_passes(program, "raise-norms")
    return program


def scaled(program: Program, passes: str, tokens: list[Tensor]) -> tuple[float, list[Report]]:
    """How far `passes` move the function, on tokens that they have not seen; a cache is in a basis of its own."""
    ids = torch.randint(3, 90, (3, 7), generator=torch.Generator().manual_seed(8))
    feeds = fill(program, {"input_ids": ids})
    before = observe(program, feeds)
    reports = run_passes(program, passes, tokens)
    return drift(observe(program, feeds), before), reports


@pytest.mark.parametrize("passes", [*PASSES, CHAIN])
@pytest.mark.parametrize("name", ["llama", "opt", "moe"])
def test_embedded_models_stay(name: str, passes: str, embedded: Callable[[str], Program], tokens: list[Tensor]) -> None:
    moved, reports = scaled(embedded(name), passes, tokens)
    assert moved <= 1e-10
    assert all(report.rewritten for report in reports)


@pytest.mark.parametrize("name", FAMILIES)
def test_families_stay(name: str, tokens: list[Tensor]) -> None:
    for passes in PASSES:
        moved, (report,) = scaled(made(name).clone(), passes, tokens)
        assert moved <= 1e-10, passes
        assert report.rewritten or (name, passes) == ("falcon", "equalize"), passes  # its gelu keeps weights apart


@pytest.mark.parametrize("passes", PASSES)
def test_float32_stays(passes: str, tokens: list[Tensor]) -> None:
    assert scaled(single().clone(), passes, tokens)[0] <= 1e-5


def test_the_self_check_looks_at_passes_with_data(embedded: Callable[[str], Program], tokens: list[Tensor]) -> None:
    """A calibrated pass that keeps the function is measured as any other."""
    program = embedded("llama")
    check = Drift(fill(program, {"input_ids": tokens[0]}), tolerance=1e-10, only_preserving=True)
    passes = parse_pipeline("smooth, awq-scale(spec=int4 sym channel, rows=8, grid=2)")
    reports = PassManager(passes, [check], tokens).run(program)
    assert all(report.drift is not None and report.drift <= 1e-10 for report in reports)


def test_a_tied_head_is_untied_for_what_it_costs(embedded: Callable[[str], Program], tokens: list[Tensor]) -> None:
    """The head reads the last norm's channels, the embedding makes the stream's: with the head among the roles they part."""
    program = embedded("opt")
    assert scaled(program, "smooth", tokens)[0] <= 1e-10
    assert not any("untied" in key for key in program.weights)
    moved, (report,) = scaled(program, "smooth(roles=[head])", tokens)
    assert moved <= 1e-10
    (copy,) = [key for key in program.weights if "untied" in key]
    assert any("MB more" in note and copy.removesuffix(".untied") in note for note in report.notes)


@pytest.mark.parametrize("name", ["llama", "gemma2"])
def test_every_product_is_scaled_or_told_of(
    name: str, embedded: Callable[[str], Program], tokens: list[Tensor]
) -> None:
    program = embedded(name) if name == "llama" else made(name).clone()
    for passes in PASSES:
        copy = program.clone()
        (report,) = run_passes(copy, passes, tokens)
        assert all(entry.what for entry in report.skipped)
        scaled_weights = sum(not torch.equal(copy.weights[key], program.weights[key]) for key in program.weights)
        products = len(copy.calls(torch.ops.aten.linear.default))
        assert scaled_weights + len(report.skipped) >= products
