"""Whole decoders: prefill, an empty cache, one token after another; names, sizes, files."""

from __future__ import annotations

import gc
import json
import weakref
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import onnx
import onnxruntime
import pytest
import torch
from onnx_programs import Lowered, error, optimized, prompt
from torch import Tensor

from qcompile.backends.onnx_qcdq import OnnxQcdqBackend
from qcompile.backends.onnx_qcdq.runtime import OnnxRunner
from qcompile.generate import ProgramStepper, generate
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.numerics.spec import QuantSpec

Make = Callable[[str, str, str | None], Lowered]
INT4, INT8 = "int4 sym group=32", "int8 sym channel"


def steps(run: Callable[[dict[str, Tensor]], dict[str, Tensor]], ids: Tensor, cuts: list[int]) -> Tensor:
    """Logits of a prompt taken in pieces, the cache passed on."""
    past: dict[str, Tensor] = {}
    logits = []
    for start, end in pairwise(cuts):
        outputs = run({"input_ids": ids[:, start:end], **past})
        past = {k.replace("present_", "past_key_values_"): v for k, v in outputs.items() if k.startswith("present")}
        logits.append(outputs["logits"])
    return torch.cat(logits, dim=1)


@pytest.mark.parametrize(
    ("name", "weights", "activations"),
    [
        ("llama", INT4, None),
        ("gpt2", INT8, "int8 asym tensor static"),
        ("opt", INT8, "int8 sym token dynamic"),
        ("mixtral", INT4, None),
        ("mixtral", INT8, None),
    ],
)
def test_agrees_in_pieces(name: str, weights: str, activations: str | None, lowered: Make) -> None:
    made = lowered(name, weights, activations)
    runner, ids = OnnxRunner(made.directory, threads=1), prompt()
    tolerance = 1e-5 if activations is None else 0.05
    expected = made.program(ids)
    for cuts in ([0, 9], [0, 5, 9], [0, 1, 2, 9]):
        assert error(steps(runner, ids, cuts), expected) < tolerance
        ours = steps(lambda feeds: made.program.run(fill(made.program, feeds)), ids, cuts)
        assert error(ours, expected) < tolerance
    assert error(runner.logits(ids[:1, :1]), made.program(ids[:1, :1])) < tolerance
    for key, codes in OnnxQcdqBackend().stored_codes(made.directory):
        assert torch.equal(codes, made.program.weights[f"{key}.codes"]), key


def test_generates_the_same_tokens(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    runner = OnnxRunner(made.directory)
    ids = prompt(length=4)
    assert runner.max_positions == 64
    assert torch.equal(runner.generate(ids, 12), generate(ProgramStepper(made.program), ids, 12))


def test_padded_prompts(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    ids, mask = prompt(), torch.ones(2, 9, dtype=torch.int64)
    mask[0, :4] = 0
    feeds = fill(made.program, {"input_ids": ids, "attention_mask": mask})
    expected, ours = made.program.run(feeds), OnnxRunner(made.directory).run(feeds)
    assert error(ours["logits"][:, -1], expected["logits"][:, -1]) < 1e-5


def test_kernels(lowered: Make) -> None:
    assert optimized(lowered("llama", INT4, None).directory)["MatMulNBits"] == 14
    assert optimized(lowered("gpt2", INT8, "int8 asym tensor static").directory)["MatMulIntegerToFloat"] == 4
    assert optimized(lowered("opt", INT8, "int8 sym token dynamic").directory)["MatMulIntegerToFloat"] == 6


def test_fast_trades_accuracy(lowered: Make) -> None:
    made, ids = lowered("llama", INT4, None), prompt()
    exact, fast = OnnxRunner(made.directory).logits(ids), OnnxRunner(made.directory, fast=True).logits(ids)
    assert error(exact, made.program(ids)) < 1e-6 < error(fast, made.program(ids)) < 0.1


def test_names_and_sizes_are_those_of_genai(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    session = onnxruntime.InferenceSession(str(made.directory / "model.onnx"))
    inputs = {value.name: value.shape for value in session.get_inputs()}
    assert list(inputs) == ["input_ids", "attention_mask", "position_ids"] + [
        f"past_key_values.{layer}.{part}" for layer in range(2) for part in ("key", "value")
    ]
    assert inputs["attention_mask"] == ["batch", "past + sequence"]
    assert inputs["past_key_values.1.value"] == ["batch", 2, "past", 16]
    outputs = {value.name: value.shape for value in session.get_outputs()}
    assert list(outputs)[:3] == ["logits", "present.0.key", "present.0.value"]
    assert outputs["logits"] == ["batch", "sequence", 96]
    assert outputs["present.0.key"] == ["batch", 2, "past + sequence", 16]


def test_genai_config(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    model = json.loads((made.directory / "genai_config.json").read_text())["model"]
    decoder = model["decoder"]
    assert (model["type"], model["vocab_size"], model["context_length"]) == ("llama", 96, 64)
    assert (decoder["num_hidden_layers"], decoder["num_key_value_heads"], decoder["head_size"]) == (2, 2, 16)
    names = {i.name for i in onnx.load(made.directory / "model.onnx", load_external_data=False).graph.input}
    assert decoder["inputs"]["past_key_names"] % 0 in names
    assert decoder["inputs"]["input_ids"] in names


def test_values_and_nodes_keep_the_programs_names(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    graph = onnx.load(made.directory / "model.onnx", load_external_data=False).graph
    values = {name for node in graph.node for name in node.output}
    linears = [node.name for node in made.program.calls(torch.ops.aten.linear.default)]
    assert len(set(linears) & values) >= len(linears) - 1  # the last is the output, called logits
    assert "model.layers.0.mlp.up_proj/MatMul" in {node.name for node in graph.node}
    assert "model.layers.0.mlp.up_proj.weight.codes" in {i.name for i in graph.initializer}


def test_weights_lie_outside_the_model(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    graph = onnx.load(made.directory / "model.onnx", load_external_data=False).graph
    for initializer in graph.initializer:
        size = len(initializer.raw_data)
        assert size <= 256, initializer.name
    kinds = {i.name: i.data_type for i in graph.initializer}
    assert kinds["model.layers.0.self_attn.q_proj.weight.codes"] == onnx.TensorProto.INT4
    assert made.files.main == "model.onnx"
    assert sorted(p.name for p in made.directory.iterdir()) == ["genai_config.json", "model.onnx", "model.onnx.data"]


def test_first_difference_names_the_node(lowered: Make) -> None:
    made = lowered("llama", INT4, None)
    other = made.program.clone()
    key = "model.layers.1.mlp.up_proj.weight.scale"
    other.weights[key] = other.weights[key] * 1.5
    feeds = fill(other, {"input_ids": prompt()})
    backend = OnnxQcdqBackend()
    where = backend.first_difference(other, made.directory, feeds, 1e-3)
    assert where.startswith("model.layers.1.mlp.up_proj (linear")
    assert backend.first_difference(made.program, made.directory, feeds, 1e-3).startswith("in a fused kernel")
    assert len(list(made.directory.iterdir())) == 3


def test_one_weight_is_in_memory_at_a_time(lowered: Make, tmp_path: Path) -> None:
    program = lowered("llama", INT4, None).program.clone()
    alive: list[weakref.ref[Tensor]] = []
    most = 0

    def watch(tensor: Tensor) -> Tensor:
        nonlocal most
        gc.collect()
        most = max(most, sum(ref() is not None for ref in alive))
        copy = tensor.clone()
        alive.append(weakref.ref(copy))
        return copy

    for key in list(program.weights):
        if key.endswith((".codes", "embed_tokens.weight", "lm_head.weight")):
            program.weights.edit(key, watch)
    OnnxQcdqBackend().lower(program, tmp_path)
    assert len(alive) == 16
    assert most <= 1


def test_a_table_that_stays_float_for_another_reader_is_counted_apart(tmp_path: Path) -> None:
    table = torch.randn(32, 16)
    made = QuantSpec.parse("int8 sym channel").quantize(table)
    text = """
def main(ids: i64[batch, sequence], *, w: f32[32, 16] = "t", c: i8[32, 16] = "t.codes", s: f32[32, 1] = "t.scale"):
    x: none = aten.embedding.default(w, ids)
    d: none = qcompile.dequantize.default(c, s, None, "int8 sym channel")
    y: none = aten.linear.default(x, d)
    return {"y": y}
"""
    program = Program.parse(text.strip(), {"t": table, "t.codes": made.codes, "t.scale": made.scale})
    files = OnnxQcdqBackend().lower(program, tmp_path)
    assert {t.name: (t.container, t.bits_per_element) for t in files.tensors} == {
        "t (float copy)": ("float32", 32.0),
        "t": ("int8", 10.0),
    }
    feeds = {"ids": torch.tensor([[0, 31]])}
    assert error(OnnxRunner(tmp_path).run(feeds)["y"], program.run(feeds)["y"]) < 1e-6
