"""Products with matrices that were picked row by row, beside the same with every matrix copied."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from qcompile.ir import gathered
from qcompile.ir.program import Program
from qcompile.ir.run import run

TEXT = """def main(x: f64[rows, 3, 8], i: i64[rows], *, w: f64[4, {shape}]):
    picked = aten.index.Tensor(w, [i])
    y = aten.bmm.default({arguments})
    return {{"y": y}}"""
FORMS = {"w x": ("5, 3", "picked, x"), "x w": ("8, 5", "x, picked")}


def feeds(rows: int) -> dict[str, Tensor]:
    random = torch.Generator().manual_seed(rows)
    index = torch.randint(-4, 3, (rows,), generator=random)  # the last expert is known by a negative number alone
    return {"x": torch.randn(rows, 3, 8, generator=random, dtype=torch.float64), "i": index}


@pytest.mark.parametrize("rows", [1, 4, 5, 50])
@pytest.mark.parametrize("form", FORMS)
def test_a_product_is_that_of_copies(form: str, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    shape, arguments = FORMS[form]
    program, given = Program.parse(TEXT.format(shape=shape, arguments=arguments)), feeds(rows)
    w = program.weights["w"][given["i"]]
    exact = w @ given["x"] if form == "w x" else given["x"] @ w
    found = run(program, given)["y"]
    assert found.shape == exact.shape
    assert (found - exact).abs().max() < 1e-12 * exact.abs().max()

    def never(self: Any, others: Tensor, turned: bool) -> Tensor:
        raise AssertionError("dealt out")

    monkeypatch.setattr(gathered.Gathered, "products", never)
    if rows > 4:
        with pytest.raises(AssertionError, match="dealt out"):
            run(program, given)
    else:
        assert torch.equal(run(program, given)["y"], exact)  # few rows are cheaper to copy


def test_what_something_else_reads_is_a_tensor() -> None:
    program = Program.parse(
        """def main(x: f64[rows, 3, 8], i: i64[rows], *, w: f64[4, 5, 3]):
    picked = aten.index.Tensor(w, [i])
    y = aten.bmm.default(picked, x)
    z = aten.neg.default(picked)
    return {"y": y, "z": z}"""
    )
    given = feeds(9)
    assert torch.equal(run(program, given)["z"], -program.weights["w"][given["i"]])
