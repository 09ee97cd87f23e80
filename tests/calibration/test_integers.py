"""Sums in 8-bit integers: the same as a slow reference, near those in floating point, and good enough to round by."""

from __future__ import annotations

import pytest
import torch
from calibration import tiny
from torch import Tensor

from qcompile import run_passes
from qcompile.calibration import integers
from qcompile.calibration.settings import Settings
from qcompile.calibration.statistics import Gram
from qcompile.recipe import Recipe


def rows(tokens: int, width: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Correlated features of many sizes, one of them dead, and now and then a token far out."""
    random = torch.Generator().manual_seed(seed)
    mixing = torch.randn(width, width, generator=random, dtype=dtype) / width**0.5 + torch.eye(width, dtype=dtype)
    x = torch.randn(tokens, width, generator=random, dtype=dtype) @ mixing
    x *= torch.logspace(-3, 2, width, dtype=dtype)
    x[tokens // 3, width // 2] *= 1000
    x[:, 1] = 0
    return x


def gram(x: Tensor, other: Tensor | None, in_integers: bool) -> Gram:
    found = Gram(in_integers)
    for start in range(0, len(x), 1500):
        found.add(x[start : start + 1500], None if other is None else other[start : start + 1500])
    found.settle(x.dtype)
    return found


def slow(x: Tensor, other: Tensor) -> tuple[Tensor, Tensor]:
    """Token by token, from the docstring."""
    hessian, cross = torch.zeros(2, x.shape[1], x.shape[1], dtype=torch.float64)
    for outer in range(0, len(x), 1500):
        for start in range(outer, min(outer + 1500, len(x)), 1024):
            parts = [t[start : min(start + 1024, outer + 1500)] for t in (x, other)]
            loud = [(p.abs() > 16 * p.square().mean(0).sqrt()).any(1) for p in parts]
            quiet = ~(loud[0] | loud[1])
            scales = [p[quiet].abs().amax(0) / 127 for p in parts]
            codes = [torch.nan_to_num((p / s).round()) for p, s in zip(parts, scales, strict=True)]
            for t in range(len(parts[0])):
                left, right = (c[t] * s if quiet[t] else p[t] for c, s, p in zip(codes, scales, parts, strict=True))
                hessian += torch.outer(left, left)
                cross += torch.outer(left, right)
    return hessian, cross


def test_sums_are_those_of_the_reference() -> None:
    x = rows(2100, 24, 0, torch.float64)
    other = x + 0.1 * rows(2100, 24, 1, torch.float64)
    found = gram(x, other, True)
    hessian, cross = slow(x, other)
    size = hessian.diagonal().sqrt()
    assert found.hessian is not None
    assert found.cross is not None
    assert ((found.hessian - hessian).abs() <= 1e-12 * torch.outer(size, size)).all()
    other_size = other.square().sum(0).sqrt()
    assert ((found.cross - cross).abs() <= 1e-12 * torch.outer(size, other_size)).all()


@pytest.mark.parametrize("width", [40, 700])
def test_entries_are_off_by_less_than_another_sample_of_tokens_would_change(width: int) -> None:
    x = rows(3000, width, 2)
    found, exact = gram(x, None, True).hessian, gram(x, None, False).hessian
    assert found is not None
    assert exact is not None
    size = exact.diagonal().sqrt()
    wrong = (found - exact).abs() / torch.outer(size, size).clamp(min=1e-30)
    assert wrong.square().mean().sqrt() < 0.04 / 3000**0.5
    assert wrong.max() < 0.2 / 3000**0.5
    assert torch.equal(found[1], torch.zeros(width))  # what is dead stays so
    assert torch.linalg.eigvalsh(found.double()).min() > -1e-6 * exact.diagonal().max()


def test_every_processor_gives_the_same_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    x = rows(1300, 96, 3)
    first = gram(x, x.flip(0), True)
    monkeypatch.setattr(integers, "_multiplies_bytes", lambda: False)
    second = gram(x, x.flip(0), True)
    assert all(torch.equal(a, b) for a, b in zip(first.parts(), second.parts(), strict=True))


def test_tokens_that_are_all_far_out_are_added_up_as_they_are() -> None:
    x = torch.zeros(600, 600)
    x.fill_diagonal_(3.0)
    found = gram(x, x, True)
    assert found.hessian is not None
    assert torch.equal(found.hessian, 9 * torch.eye(600))
    assert found.cross is not None
    assert torch.equal(found.cross, 9 * torch.eye(600))


def test_features_next_to_nothing_count_as_nothing() -> None:
    x = rows(1100, 20, 4)
    x[:, 5] = 1e-38 * torch.sign(x[:, 5])
    codes, scale = integers._Turned.of(x).codes()
    assert codes[5].tolist() == [0] * 1100
    assert scale[5] == 1
    assert codes.int().abs().amax(1).tolist() == [127 if i not in (1, 5) else 0 for i in range(20)]


@pytest.mark.parametrize("method", ["gptq", "gptq(target=float)"])
def test_rounding_by_them_costs_next_to_nothing(method: str) -> None:
    losses = {}
    for sums in ("float32", "int8"):
        program = tiny.decoder(2, "f32")
        settings = Settings(sums=sums)  # type: ignore[arg-type]
        passes = f"insert-qdq(weights=int3 sym group=8), {method}"
        (*_, report) = run_passes(program, passes, tiny.tokens(), settings=settings)
        key = "gap" if "float" in method else "loss"
        losses[sums] = sum(figures[key] for figures in report.measured.values() if key in figures)
    assert losses["int8"] != losses["float32"]
    assert losses["int8"] == pytest.approx(losses["float32"], rel=0.05)


def test_a_recipe_asks_for_them() -> None:
    recipe = Recipe.load("gptq-int4").override(["calibration.sums=int8"])
    assert recipe.calibration.settings().sums == "int8"
