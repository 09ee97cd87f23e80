"""Caches of codes, and attention on rounded values: what goes into a session and comes out of it, and that tokens stay.

Two runtimes sum in another order, so an entry between two codes may become either; nothing else may differ.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from onnx_programs import VOCABULARY, decoder, error, prompt
from torch import Tensor

import qcompile
from qcompile import zoo
from qcompile.backends.onnx_qcdq import OnnxQcdqBackend
from qcompile.backends.onnx_qcdq.genai import write_genai_config
from qcompile.backends.onnx_qcdq.prelower import prelower
from qcompile.backends.onnx_qcdq.runtime import OnnxRunner
from qcompile.generate import ProgramStepper, generate
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.attention import QuantizeAttention
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import InsertQDQ
from qcompile.passes.quantize.kv_cache import QuantizeKVCache
from qcompile.passes.quantize.rtn import RTN

TOKEN = "int8 sym token dynamic"
INPUT = "input_ids: i64[b, s], past_key_values_0_key: f32[b, 2, past, 8], past_key_values_0_value: f32[b, 2, past, 8]"
CACHE = f"""def main({INPUT}, *, e: f32[9, 8]):
    rows = aten.embedding.default(e, input_ids)
    one = aten.unsqueeze.default(rows, 1)
    v = aten.expand.default(one, [-1, 2, -1, -1])
    k = aten.neg.default(v)  # attn
    keys = aten.cat.default([past_key_values_0_key, k], 2)  # attn
    values = aten.cat.default([past_key_values_0_value, v], 2)  # attn
    y = aten.scaled_dot_product_attention.default(v, keys, values)  # attn
    return {{"y": y, "present_0_key": keys, "present_0_value": values}}"""


def in_pieces(step: Callable[[dict[str, Tensor]], Any], program: Program, ids: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """``y`` of a prompt taken in three pieces, and the cache in the end."""
    past = {n.name: n.meta["val"] for n in program.inputs[1:]}
    cache = {name: torch.zeros(len(ids), v.shape[1], 0, v.shape[3], dtype=v.dtype) for name, v in past.items()}
    found = []
    for piece in ids.split([4, 1, 3], 1):
        out = step({"input_ids": piece, **cache})
        cache = {name.replace("present", "past_key_values"): t for name, t in out.items() if name != "y"}
        found.append(out["y"])
    return torch.cat(found, 2), cache


@pytest.mark.parametrize(
    ("keys", "values"),
    [
        (TOKEN, "uint8 asym token scale=f16 dynamic"),
        ("int4 sym group=4 dynamic", "uint4 asym token zero=float dynamic"),
        ("int2 asym token dynamic", "int5 sym token dynamic"),
        ("int8 sym tensor static", "int4 asym channel axis=1,-1 static"),
        ("int8 asym tensor static", "uint8 asym channel static"),
    ],
)
def test_codes_go_out_and_come_back(keys: str, values: str, tmp_path: Path) -> None:
    table = torch.randn(9, 8, generator=torch.Generator().manual_seed(1))
    table[3] = 0  # a token of zeros
    program, ids = Program.parse(CACHE, {"e": table}), torch.arange(16).view(2, 8) % 9
    PassManager([QuantizeKVCache(keys=keys, values=values), Calibrate()], batches=[ids]).run(program)
    OnnxQcdqBackend().lower(program, tmp_path)
    runner = OnnxRunner(tmp_path, threads=1)
    expected, codes = in_pieces(program.run, program, ids)
    ours, stored = in_pieces(runner.run, program, ids)
    assert error(ours, expected) < 1e-6
    assert list(stored) == list(codes)
    for name, tensor in codes.items():
        assert stored[name].dtype == tensor.dtype
        if name.endswith("_scale"):  # a group of zeros gets the least scale here, 1 there
            tensor[tensor == 1.0] = stored[name][tensor == 1.0]
        torch.testing.assert_close(stored[name], tensor, rtol=1e-6, atol=0, msg=name)


# ---------------------------------------------------------------------------------------------------- embedded models

RECIPES: dict[str, tuple[dict[str, Any], float]] = {  # → and bytes of one token, over those of floats
    "llama": ({"weights": "int4 sym group=32", "kv_cache": TOKEN}, 36 / 128),
    "opt": (
        {
            "weights": "int4 sym group=32",
            "kv_cache": {"keys": "int8 asym token dynamic", "values": "int4 asym group=16 dynamic"},
        },
        (37 + 16 + 2 * 5) / 256,
    ),
    "moe": (
        {
            "weights": "e4m3fn channel",
            "embeddings": "int8 sym channel",
            "kv_cache": "int8 sym tensor static",
            "calibration": {"samples": 4, "length": 32},
        },
        1 / 4,
    ),
}


@pytest.mark.parametrize("name", zoo.NAMES)
def test_embedded(name: str, tmp_path: Path) -> None:
    recipe, share = RECIPES[name]
    compiled = qcompile.compile(zoo.path(name), recipe)
    artifact = compiled.export("onnx_qcdq", tmp_path / "out")
    assert qcompile.verify(tmp_path / "out").manifest == artifact.manifest
    assert artifact.manifest.agreement is not None
    assert artifact.manifest.agreement.max_relative_error < 0.02
    ids = torch.randint(3, 500, (2, 9), generator=torch.Generator().manual_seed(5))
    tokens = generate(ProgramStepper(compiled.program), ids, 32)
    assert_same_or_tied(compiled.program, tokens, artifact.generate(ids, 32))
    inputs = {i.name: i.type for i in artifact.runner.session.get_inputs() if i.name.startswith("past")}  # type: ignore[attr-defined]
    assert {inputs[f"past_key_values.1.{part}"] for part in ("key", "value")} <= {"tensor(int8)", "tensor(uint8)"}
    assert all(kind == "tensor(float)" for name, kind in inputs.items() if name.endswith("_scale"))
    cache = {n: t for n, t in artifact.run_named({"input_ids": ids}).items() if n.startswith("present")}
    floats = sum(
        4 * t.numel()
        for n, t in compiled.reference.run(fill(compiled.reference, {"input_ids": ids})).items()
        if n != "logits"
    )
    assert sum(t.nbytes for t in cache.values()) == share * floats


def assert_same_or_tied(program: Program, ours: Tensor, theirs: Tensor) -> None:
    """Greedy tokens are the same in each row, or part where the program itself is all but undecided."""
    for row, other in zip(ours, theirs, strict=True):
        if len(differs := (row != other).nonzero()):
            step = int(differs[0])
            logits = program(row[None, :step])[0, -1]
            assert logits[row[step]] - logits[other[step]] < 0.02 * logits.abs().max()


# ------------------------------------------------------------------------------------------------- attention, results


def test_attention_on_rounded_values(tmp_path: Path) -> None:
    """Dynamic queries, static keys and values, weights spelled out; results rounded too."""
    program = decoder("llama").clone()
    passes = [
        InsertQDQ(weights="int8 sym channel", outputs="int8 asym tensor static"),
        QuantizeAttention(
            q=TOKEN, k="int8 sym tensor static", v="uint8 asym tensor static", softmax="uint8 tensor static"
        ),
        Calibrate(),
        RTN(),
    ]
    batches = [torch.randint(0, VOCABULARY, (2, 16), generator=torch.Generator().manual_seed(0))]
    PassManager(passes, batches=batches).run(program)
    ids = prompt()
    expected = program(ids)
    assert error(prelower(program).program(ids), expected) < 1e-6  # what is left are ties
    OnnxQcdqBackend().lower(program, tmp_path)
    assert error(OnnxRunner(tmp_path, threads=1).logits(ids), expected) < 0.03
    operators = [node.op_type for node in onnx.load(tmp_path / "model.onnx", load_external_data=False).graph.node]
    assert operators.count("QuantizeLinear") == 2 * (
        7 + 4
    )  # in two layers seven results (not the head's); q, k, v, softmax


# ------------------------------------------------------------------------------------------------- onnxruntime-genai


@pytest.mark.parametrize(
    ("keys", "values", "says"),
    [
        ("int8 sym tensor static", "int8 asym tensor static", "genai_config.json is for onnxruntime-genai"),
        ("int4 sym tensor static", "int4 sym tensor static", "genai_config.json is for onnxruntime-genai"),
        (TOKEN, TOKEN, "no genai_config.json: onnxruntime-genai feeds a cache no scales; use a static"),
        (
            "int8 sym tensor static",
            "uint8 asym tensor static",
            "wants keys and values of one type and shape; give both",
        ),
        ("int8 sym tensor static", "int4 sym tensor static", "wants keys and values of one type and shape; give both"),
    ],
)
def test_what_genai_can_hold(keys: str, values: str, says: str, tmp_path: Path) -> None:
    program = decoder("llama").clone()
    QuantizeKVCache(keys=keys, values=values).run(program)
    note = write_genai_config(program, tmp_path)
    assert note is not None
    assert says in note
    path = tmp_path / "genai_config.json"
    assert path.exists() == (not note.startswith("no "))
    if path.exists():
        width = 16 * QuantSpec.parse(keys).bits // 8
        assert json.loads(path.read_text())["model"]["decoder"]["head_size"] == width
