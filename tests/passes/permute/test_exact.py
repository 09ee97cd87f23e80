"""Permuting, widening and untying keep the function of real architectures to 1e-10 in float64."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from qcompile import run_passes
from qcompile.drift import drift, observe
from qcompile.ir.program import Program
from qcompile.ir.run import fill

FAMILIES = ["gpt2", "phi3", "gemma2", "mixtral", "falcon", "bloom", "qwen3", "mpt"]
CENTRED = "raise-norms, fold-embedding-norm, fold-norm-affine, center-norm"
ALL = f"{CENTRED}, expand(stream=true, step=1), permute, rotate(orphans=true)"
EACH = [
    "raise-norms, permute",
    "raise-norms, permute(arrange=even, group=4, score=norm, descending=false)",
    "raise-norms, expand(to=multiple, step=20)",
    f"{CENTRED}, expand(hidden=false, stream=true, step=2)",
]
MINE = ("expand", "permute", "untie-embeddings")


def check(program: Program, passes: str) -> None:
    """All passes together keep the function, and those that are tested here all did something."""
    ids = torch.randint(3, 90, (2, 7), generator=torch.Generator().manual_seed(1))
    feeds = fill(program, {"input_ids": ids})
    before = observe(program, feeds)
    for report in run_passes(program, passes):
        assert report.rewritten or not report.pass_name.startswith(MINE), report.pass_name
    assert drift(observe(program, feeds), before) <= 1e-10


@pytest.mark.parametrize("name", FAMILIES)
def test_families(name: str, family: Callable[[str], Program]) -> None:
    check(family(name), ALL)


@pytest.mark.parametrize("name", ["llama", "opt", "moe"])
@pytest.mark.parametrize("passes", EACH)
def test_embedded_models(name: str, passes: str, embedded: Callable[[str], Program]) -> None:
    check(embedded(name), passes)


def test_untied_head(embedded: Callable[[str], Program]) -> None:
    check(embedded("opt"), "untie-embeddings")
