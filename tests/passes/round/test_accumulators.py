"""Codes that cannot overflow an accumulator: the worst input is made and added up, and the manifest says so."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import qcompile
from qcompile.compiled import CompiledModel
from qcompile.errors import QCompileError, RecipeError
from qcompile.manifest import AccumulatorEntry, Manifest

Compiled = Callable[..., CompiledModel]


def worst(codes: torch.Tensor, low: int, high: int, tile: int) -> tuple[int, int]:
    """The extreme partial sums of any input, found by adding up the worst one column by column."""
    highest = lowest = 0
    for part in codes.to(torch.int64).split(tile, 1):
        above = torch.zeros(len(codes), dtype=torch.int64)
        below = above.clone()
        for column in part.unbind(1):
            above += torch.maximum(column * low, column * high)
            below += torch.minimum(column * low, column * high)
            highest, lowest = max(highest, int(above.max())), min(lowest, int(below.min()))
    return highest, lowest


@pytest.mark.parametrize(
    ("text", "activations", "inputs"),
    [
        ("gptq(accumulator_bits=13, accumulator_tile=16)", "int8 sym token dynamic", (-128, 127)),
        ("gpfq(accumulator_bits=13, accumulator_tile=8)", "int8 sym narrow token dynamic", (-127, 127)),
        ("qronos(accumulator_bits=14, accumulator_tile=16)", "int8 asym token dynamic", (-255, 255)),
        ("awq-clip(accumulator_bits=11, accumulator_tile=16)", "uint4 sym token dynamic", (0, 15)),
    ],
)
def test_no_input_overflows(
    compiled: Compiled, text: str, activations: str, inputs: tuple[int, int], tmp_path: Path
) -> None:
    model = compiled([text], activations=activations)
    bits, tile = (int(word.split("=")[1].rstrip(")")) for word in text.split("(")[1].split(", "))
    model.save(tmp_path / "saved")
    entries = {n: t.accumulator for n, t in Manifest.read(tmp_path / "saved").tensors.items() if t.accumulator}
    assert len(entries) == 14
    free = compiled([text.split("(")[0]], activations=activations)
    limit, tight = 2 ** (bits - 1) - 1, 0
    for name, entry in entries.items():
        codes = model.program.weights[f"{name}.codes"]
        highest, lowest = worst(codes, *inputs, tile)
        assert entry == AccumulatorEntry(
            bits=bits,
            tile=tile,
            input_min=inputs[0],
            input_max=inputs[1],
            highest=highest,
            lowest=lowest,
            limit=limit,
            holds=True,
        )
        assert max(highest, -lowest) <= limit
        unbound = worst(free.program.weights[f"{name}.codes"], *inputs, tile)
        tight += max(unbound[0], -unbound[1]) > limit
    assert tight  # the bound asked for something


def test_a_static_zero_point_is_known_when_codes_are_chosen(compiled: Compiled) -> None:
    model = compiled(["gptq(accumulator_bits=14, accumulator_tile=16)"], activations="int8 asym tensor static")
    for name, entry in model.report.accumulators().items():
        module = name.removesuffix(".weight")
        stored = [k for k in model.program.weights if k.endswith("input.zero_point")]
        shared = f"{module}.input.zero_point"
        if shared in stored:
            zero = int(model.program.weights[shared])
            assert (entry.input_min, entry.input_max) == (-128 - zero, 127 - zero)
    assert any(e.input_max != 255 for e in model.report.accumulators().values())


def test_the_proof_is_in_the_artifact(compiled: Compiled, tmp_path: Path) -> None:
    model = compiled(["gptq(accumulator_bits=13, accumulator_tile=16)"], activations="int8 sym token dynamic")
    artifact = model.export("onnx_qcdq", tmp_path / "artifact")
    proofs = model.report.accumulators()
    found = {n: t.accumulator for n, t in artifact.manifest.tensors.items() if t.accumulator is not None}
    assert found == proofs
    model.save(tmp_path / "saved")
    assert qcompile.load(tmp_path / "saved").report.accumulators() == proofs


def test_the_page_on_calibration_runs() -> None:
    page = Path(__file__).parents[3] / "docs" / "calibration.md"
    (code,) = re.findall(r"^```python\n(.*?)^```$", page.read_text(), re.MULTILINE | re.DOTALL)
    exec(compile(code, "calibration.md", "exec"), {})


REFUSED = [
    ("int4 sym group=16", None, 16, r"its input \w+ is not quantized; accumulator_bits needs activations"),
    ("int4 sym group=16", "e4m3fn token dynamic", 16, "its input is e4m3fn .*, not integer codes"),
    ("int4 asym group=16", "int8 sym token dynamic", 16, "int4 asym group=16 sums up no plain codes"),
    ("nf4 group=16", "int8 sym token dynamic", 16, "sums up no plain codes"),
    (
        "int4 sym group=16",
        "int8 sym token dynamic",
        32,
        "a tile of 32 inputs meets groups of 16, .* accumulator_tile=16",
    ),
]


@pytest.mark.parametrize(("weights", "activations", "tile", "message"), REFUSED)
def test_what_cannot_be_bounded_is_refused(
    compiled: Compiled, weights: str, activations: str | None, tile: int, message: str
) -> None:
    with pytest.raises(RecipeError, match=message) as error:
        compiled([f"gptq(accumulator_bits=16, accumulator_tile={tile})"], weights, activations)
    assert "\n" not in str(error.value)
    assert str(error.value).startswith("model.layers.0.self_attn.q_proj.weight: ")


def test_what_no_method_reaches_is_told_to_be_unbounded() -> None:
    from qcompile.ir.program import Program
    from qcompile.pass_manager import PassManager
    from qcompile.passes.quantize.insert_qdq import InsertQDQ
    from qcompile.passes.round.gptq import Gptq

    program = Program.parse(
        "def main(x: f32[batch, 4, 8], *, w: f32[6, 4, 3]):\n"
        "    y = aten.conv1d.default(x, w)  # c\n"
        "    return {'y': y}"
    )
    passes = [InsertQDQ(weights="int8 sym channel", activations="int8 sym tensor dynamic"), Gptq(accumulator_bits=20)]
    try:
        reports = PassManager(passes, batches=[{"x": torch.randn(2, 4, 8)}]).run(program)
    except QCompileError as error:  # pragma: no cover
        pytest.fail(str(error))
    assert "no accumulator bound is kept" in reports[-1].skipped[0].what
