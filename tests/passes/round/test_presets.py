"""Presets that round from calibration data, and act order by permuted channels, on a tiny model."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.ir.contractions import find_contractions
from qcompile.ir.program import Program
from qcompile.ir.run import fill, run
from qcompile.numerics.qtensor import QTensor
from qcompile.recipe import Recipe

Compiled = Callable[..., CompiledModel]
DATA = torch.randint(0, 64, (16, 24), generator=torch.Generator().manual_seed(0))
PRESETS = {
    "gptq-int4": ["weights.group=16"],
    "qronos-int4": ["weights.group=16"],
    "gptaq-int4": ["weights.group=16"],
    "dpq-w4a8": ["weights.group=16"],
    "mr-gptq-mxfp4": [],
    "mr-gptq-nvfp4": [],
    "rotated-w4a4": ["weights.group=16"],
}


@pytest.mark.parametrize("name", PRESETS)
def test_preset(tiny: Callable[[str], Program], name: str) -> None:
    overrides = [*PRESETS[name], "calibration.samples=16", "calibration.length=24"]
    found = qcompile.compile(tiny("qwen3"), name, DATA, overrides=overrides)
    report = found.report.passes[-1]
    assert len(report.rewritten) == 14
    assert all(f["rtn_kept"] == 0 for f in report.measured.values() if "rtn_kept" in f)
    assert found.reference is not None
    nearest = qcompile.compile(
        tiny("qwen3"), {**Recipe.load(name).override(overrides).to_dict(), "passes": _plain(name)}, DATA
    )
    wanted = found.reference(DATA)
    errors = [float((m(DATA) - wanted).square().mean()) for m in (found, nearest)]
    assert errors[0] < errors[1]


def _plain(name: str) -> list[str]:
    """The same passes without the one that rounds."""
    return [text for text in Recipe.load(name).passes or () if not text.startswith(("gptq", "gptaq", "qronos"))]


def test_codes_of_dpq_decode_to_fp8(tiny: Callable[[str], Program]) -> None:
    overrides = ["weights.group=16", "calibration.samples=16", "calibration.length=24"]
    program = qcompile.compile(tiny("qwen3"), "dpq-w4a8", DATA, overrides=overrides).program
    c = find_contractions(program)[0]
    values: list[torch.Tensor] = []
    run(program, fill(program, {"input_ids": DATA[:1]}), lambda n, v: values.append(v) if n is c.path[-1] else None)
    scale = program.weights[f"{program.key(c.weight).removesuffix('.codes')}.via_scale"]
    small = (values[0] / scale).to(torch.float8_e4m3fn).float()
    assert torch.equal(small * scale, values[0])
    assert 16 < len(small.unique()) < 256  # many values, all of them fp8's


def test_channels_in_act_order_need_no_scattered_groups(compiled: Compiled) -> None:
    """permute-by-hessian puts channels in order; gptq then takes them as they stand, groups being neighbours."""
    errors = {}
    for order in ("false", "group"):
        for passes in ([f"gptq(act_order={order})"], ["permute-by-hessian", f"gptq(act_order={order})"]):
            model = compiled(["raise-norms", "fold-norm-affine", *passes], weights="int3 sym group=16")
            figures = model.report.passes[-1].measured
            assert all(f["loss"] <= f["rtn_loss"] for f in figures.values() if "loss" in f)
            errors[order, len(passes)] = sum(f["loss"] for f in figures.values() if "loss" in f)
            assert not any(n.target is torch.ops.aten.index_select.default for n in model.program.nodes)
    assert errors["false", 2] < errors["false", 1]  # rounding in order pays
    assert errors["group", 2] < errors["false", 1]


def test_a_stored_weight_is_what_qtensor_decodes(compiled: Compiled) -> None:
    """The report's signal to noise ratio is that of the codes in the program."""
    from qcompile.numerics import QuantSpec
    from qcompile.numerics.qtensor import sqnr_db

    model = compiled(["qronos"], weights="int3 sym group=16")
    assert model.reference is not None
    key = "model.layers.1.mlp.down_proj.weight"
    weights = model.program.weights
    result = QTensor(weights[f"{key}.codes"], weights[f"{key}.scale"], None, QuantSpec.parse("int3 sym group=16"))
    found = sqnr_db(model.reference.weights[key], result.dequantize(torch.float32))
    assert model.report.sqnr()[key] == pytest.approx(found, abs=1e-3)
