"""benchmarks/mutation_faults.py: every fault can still be seeded."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def test_every_fault_stands_in_the_code_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    import mutations

    assert mutations.problems(mutations.FAULTS, ROOT) == []
    assert len(mutations.FAULTS) == 50
    assert all((ROOT / name).exists() for names in mutations.NEAR.values() for name in names)
