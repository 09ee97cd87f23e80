"""A cache of codes: the same numbers as rounding each key and value when it is made, in fewer bytes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import qcompile
from qcompile import zoo
from qcompile.capture import capture
from qcompile.capture.saved import load_program, save_program
from qcompile.evaluate import evaluate
from qcompile.generate import Decoding, ProgramStepper, generate, held_weights
from qcompile.ir.exported import from_exported
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.numerics.observers import Observer
from qcompile.numerics.spec import QuantSpec
from qcompile.pass_manager import PassManager
from qcompile.passes.quantize.attention import QuantizeAttention
from qcompile.passes.quantize.cache_bits import pack, unpack
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.passes.quantize.insert_qdq import quantize_value
from qcompile.passes.quantize.kv_cache import QuantizeKVCache

aten = torch.ops.aten

K8 = "int8 sym token dynamic"
K4 = "int4 asym group=4 dynamic"

CACHE = """def main(x: f32[b, 2, s, 8], past_key_values_0_key: f32[b, 2, past, 8], past_key_values_0_value: f32[b, 2, past, 8]):
    k = aten.neg.default(x)  # attn
    keys = aten.cat.default([past_key_values_0_key, k], -2)  # attn
    values = aten.cat.default([past_key_values_0_value, x], -2)  # attn
    y = aten.scaled_dot_product_attention.default(x, keys, values)  # attn
    return {"y": y, "present_0_key": keys, "present_0_value": values}"""


def quantized(program: Program, keys: str | None, values: str | None) -> Program:
    copy = program.clone()
    PassManager([QuantizeKVCache(keys=keys, values=values)]).run(copy)
    return copy


def rounded(program: Program, keys: str | None, values: str | None) -> Program:
    """New keys and values rounded when they are made, in a cache of floats."""
    copy = program.clone()
    for name, result in copy.outputs.items():
        spec = keys if name.endswith("key") else values if name.endswith("value") else None
        if spec is not None:
            past, new = copy.arg(result, "tensors")
            decoded = quantize_value(copy, new, QuantSpec.parse(spec), result, "")
            copy.set_arg(result, "tensors", [past, decoded])
    return copy


def decode(
    program: Program, ids: Tensor, mask: Tensor, chunk: int, new: int
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Greedy tokens ``[batch, new]``, the logits they were chosen from, and the cache in the end.

    The first `chunk` tokens of the prompts are fed first, the rest then, and then token by token.
    """
    decoding = Decoding(ProgramStepper(program), ids[:, :chunk], mask[:, :chunk])
    logits = [decoding.logits()]
    if chunk < ids.shape[1]:
        decoding.ids, decoding.mask = ids[:, chunk:], mask
        logits.append(decoding.logits())
    for _ in range(new):
        decoding.append(logits[-1].argmax(-1))
        logits.append(decoding.logits())
    stacked = torch.stack(logits, 1)
    return stacked.argmax(-1), stacked, decoding.cache


def assert_alike(program: Program, keys: str, values: str, new: int = 4) -> None:
    """Codes and floats that were rounded give the same, at once and in chunks, with padding on the left."""
    codes, floats = quantized(program, keys, values), rounded(program, keys, values)
    random = torch.Generator().manual_seed(2)
    ids = torch.randint(3, 64, (2, 7), generator=random)
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    share = promised(program, keys, values)
    for chunk in (7, 4):
        with held_weights(program):
            tokens, logits, cache = decode(codes, ids, mask, chunk, new)
            expected, reference, floats_cache = decode(floats, ids, mask, chunk, new)
        assert torch.equal(tokens, expected)
        assert (logits - reference).abs().max() <= 1e-6 * reference.abs().max()
        assert {name for name in cache if name in floats_cache} == set(floats_cache)
        measured = sum(t.nbytes for t in cache.values()) / sum(t.nbytes for t in floats_cache.values())
        assert measured == pytest.approx(share)


def promised(program: Program, keys: str, values: str) -> float:
    (report,) = PassManager([QuantizeKVCache(keys=keys, values=values)]).run(program.clone())
    figures = report.measured.values()
    return sum(f["bytes_per_token"] for f in figures) / sum(f["float_bytes_per_token"] for f in figures)


@pytest.fixture(scope="module")
def embedded() -> Callable[[str], Program]:
    made: dict[str, Program] = {}

    def make(name: str) -> Program:
        if name not in made:
            made[name] = capture(zoo.path(name))
        return made[name].clone()

    return make


@pytest.mark.parametrize("name", zoo.NAMES)
def test_embedded_models_decode_as_if_floats_were_rounded(name: str, embedded: Callable[[str], Program]) -> None:
    assert_alike(embedded(name), K8, "int4 asym group=16 dynamic")


@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gpt_oss", "gpt2", "bloom"])
def test_architectures_decode_as_if_floats_were_rounded(name: str, cached_decoder: Callable[..., Any]) -> None:
    _, program = cached_decoder(name)
    assert_alike(program, K4, K8)


def test_a_latent_cache_holds_codes_as_well(cached_decoder: Callable[..., Any]) -> None:
    """DeepSeek caches a latent that keys and values are made of, and the rotated part of keys: of one head, unlike wide."""
    _, program = cached_decoder("deepseek_v3")
    assert_alike(program, K4, K8)
    shapes = {
        n.name: list(n.meta["val"].shape[1::2]) for n in quantized(program, K4, K8).inputs if "values_1" in n.name
    }
    assert shapes == {
        "past_key_values_1_key": [1, 8],  # 16 codes of 4 bits
        "past_key_values_1_key_scale": [1, 4],
        "past_key_values_1_key_zero_point": [1, 4],
        "past_key_values_1_value": [1, 4],
        "past_key_values_1_value_scale": [1, 1],
    }


SPECS: dict[str, float] = {  # → bytes of 8 features of one token and head, scales and zero-points included
    "int8 sym token dynamic": 8 + 4,
    "uint8 asym token dynamic": 8 + 4 + 1,
    "int8 sym group=4 scale=f16 dynamic": 8 + 2 * 2,
    "int4 sym token dynamic": 4 + 4,
    "uint4 asym group=4 scale=bf16 zero=float dynamic": 4 + 2 * (2 + 2),
    "int2 asym token dynamic": 2 + 4 + 1,
    "int1 asym token dynamic": 1 + 4 + 1,
    "ternary token dynamic": 2 + 4,
    "int5 sym token dynamic": 8 + 4,  # a byte a code
    "e4m3fn token dynamic": 8 + 4,
    "e2m1 group=4 scale=e8m0 dynamic": 4 + 2,
    "nf4 group=8 dynamic": 4 + 4,
}


def unpacked(stored: Tensor, bits: int, width: int, signed: bool) -> Tensor:
    """Codes ``[…, width]`` of a cache, taken apart bit by bit."""
    data = stored.numpy().view(np.uint8)
    if data.shape[-1] == width:
        return stored
    lanes = np.concatenate([(data >> shift) % (1 << bits) for shift in range(0, 8, bits)], -1).astype(np.int16)
    if signed:
        lanes = np.where(lanes >= 1 << (bits - 1), lanes - (1 << bits), lanes)
    return torch.from_numpy(lanes.astype(np.int8 if signed else np.uint8))


@pytest.mark.parametrize("spec", SPECS)
def test_what_is_stored(spec: str) -> None:
    """Codes and scales are those of all tokens rounded at once, whatever calls they came in; attention reads these."""
    program = Program.parse(CACHE)
    (report,) = PassManager([QuantizeKVCache(keys=spec, values=spec)]).run(program)
    assert str(Program.parse(str(program))) == str(program)
    every = torch.randn(2, 2, 12, 8, generator=torch.Generator().manual_seed(1))
    cache: dict[str, Tensor] = empty(program)
    for tokens in every.split([5, 1, 6], 2):
        out = program.run({"x": tokens, **cache})
        cache = {n.replace("present", "past_key_values"): t for n, t in out.items() if n != "y"}
    parsed, read = QuantSpec.parse(spec), []
    for part, values in (("key", -every), ("value", every)):
        expected = parsed.quantize(values)
        mine = {n.removeprefix(f"past_key_values_0_{part}"): t for n, t in cache.items() if n.split("_")[4] == part}
        codes = unpacked(mine.pop(""), parsed.bits, 8, parsed.storage == torch.int8)
        assert torch.equal(codes, expected.codes)
        assert list(mine) == [f"_{name}" for name in expected.parameters]
        assert all(torch.equal(mine[f"_{n}"].float(), t.float()) for n, t in expected.parameters.items())
        size = sum(t.nbytes for n, t in cache.items() if n.split("_")[4] == part)
        assert size == 2 * 2 * 12 * SPECS[spec]
        assert report.measured[f"attn.{part}"] == {"bytes_per_token": 2 * SPECS[spec], "float_bytes_per_token": 64}
        read.append(expected.dequantize(torch.float32))
    wanted = torch.nn.functional.scaled_dot_product_attention(every[:, :, -6:], *read)
    assert (out["y"] - wanted).abs().max() <= 1e-6
    assert [note.startswith("attn.key: a byte a code") for note in report.notes] == (
        [True, False] if "int5" in spec else []
    )


def empty(program: Program, batch: int = 2) -> dict[str, Tensor]:
    past = {n.name: n.meta["val"] for n in program.inputs if n.name.startswith("past")}
    return {name: torch.zeros(batch, v.shape[1], 0, v.shape[3], dtype=v.dtype) for name, v in past.items()}


@pytest.mark.parametrize("bits", [1, 2, 4])
@pytest.mark.parametrize("signed", [True, False])
def test_packing_keeps_every_code(bits: int, signed: bool) -> None:
    dtype = "i8" if signed else "u8"
    program = Program.parse(f"def main(x: {dtype}[n, 16]):\n    y = aten.clone.default(x)\n    return {{'y': y}}")
    node = program.outputs["y"]
    packed = pack(program, program.inputs[0], bits, node, "m")
    node.replace_input_with(program.inputs[0], unpack(program, packed, bits, signed, node, "m"))
    lowest = -(1 << (bits - 1)) if signed else 0
    codes = (torch.arange(48).view(3, 16) * 7 % (1 << bits) + lowest).to(torch.int8 if signed else torch.uint8)
    assert torch.equal(program(codes), codes)
    assert packed.meta["val"].shape[1] == 16 * bits // 8
    assert packed.meta["val"].dtype == torch.uint8


# --------------------------------------------------------------------------------------------------- static scales


@pytest.mark.parametrize(
    "spec", ["int8 sym tensor static", "int4 asym channel axis=1,-1 static", "e4m3fn tensor static"]
)
def test_static_scales_are_those_of_the_float_program(spec: str, cached_decoder: Callable[..., Any]) -> None:
    """Also in the second layer, which a rounded cache in the first would reach."""
    _, program = cached_decoder("mistral")
    batches = [torch.randint(3, 64, (2, 9)), torch.randint(3, 64, (1, 5))]
    observers = {name: Observer(QuantSpec.parse(spec)) for name in program.output_names[1:]}
    for ids in batches:
        outputs = program.run(fill(program, {"input_ids": ids}))
        for name, observer in observers.items():
            observer.observe(outputs[name])
    floats = rounded(program, spec, spec)
    PassManager([Calibrate()], batches=batches).run(floats)
    (report, _) = PassManager([QuantizeKVCache(keys=spec, values=spec), Calibrate()], batches=batches).run(program)
    for name, observer in observers.items():
        _, layer, part = name.split("_")
        for key, tensor in zip(("scale", "zero_point"), observer.qparams().stored(), strict=False):
            assert torch.equal(program.weights[f"model.layers.{layer}.self_attn.{part}.{key}"], tensor)
    assert [name for name in program.output_names if name != "logits"] == list(observers)
    ids = batches[0]
    tokens, logits, cache = decode(program, ids, torch.ones_like(ids), 6, 5)
    expected, reference, _ = decode(floats, ids, torch.ones_like(ids), 6, 5)
    assert torch.equal(tokens, expected)
    assert (logits - reference).abs().max() <= 1e-6 * reference.abs().max()
    assert {t.element_size() for t in cache.values()} == {1}
    assert report.notes == ["until calibrate fixes them, static scales are those of each call alone"]


def test_keys_rounded_for_attention_and_for_the_cache_are_both_calibrated() -> None:
    s8 = "int8 sym tensor static"
    text = CACHE.replace("x: f32[b, 2, s, 8],", "input_ids: i64[b, s],").replace("k = aten.neg", "@k = aten.neg")
    x = "x3 = aten.embedding.default(e, input_ids)\n    x4 = aten.unsqueeze.default(x3, 1)\n"
    text = text.replace("@k", f"{x}    x = aten.expand.default(x4, [-1, 2, -1, -1])\n    k")
    text = text.replace(" past, 8]):", " past, 8], *, e: f32[9, 8]):")
    program = Program.parse(text)
    passes = [QuantizeAttention(k=s8), QuantizeKVCache(keys=s8), Calibrate()]
    ids = torch.arange(8).view(2, 4)
    PassManager(passes, batches=[ids]).run(program)
    scale = QuantSpec.parse(s8).quantize(program.weights["e"][:8]).scale.view(1, 1, 1, 1)
    assert torch.equal(program.weights["attn.key.scale"], scale)
    assert torch.equal(program.weights["attn.key_2.scale"], scale)


# ------------------------------------------------------------------------------------------------ the program around it


def test_the_signature(embedded: Callable[[str], Program]) -> None:
    program = quantized(embedded("llama"), "int4 asym token dynamic", K8)
    layer = [f"{n.name}: {program.type_of(n)}" for n in program.inputs if "values_1" in n.name]
    assert layer == [
        "past_key_values_1_key: u8[batch, 2, past, 16]",
        "past_key_values_1_key_scale: f32[batch, 2, past, 1]",
        "past_key_values_1_key_zero_point: i8[batch, 2, past, 1]",
        "past_key_values_1_value: i8[batch, 2, past, 32]",
        "past_key_values_1_value_scale: f32[batch, 2, past, 1]",
    ]
    returned = [f"{n}: {program.type_of(v)}" for n, v in program.outputs.items() if n.startswith("present_1")]
    assert returned == [t.replace("past_key_values", "present").replace("past,", "past + sequence,") for t in layer]
    assert program.output_names[0] == "logits"


def test_text_files_and_exported_programs_keep_it(embedded: Callable[[str], Program], tmp_path: Path) -> None:
    program = quantized(embedded("llama"), K4, K8)
    ids = torch.randint(3, 64, (2, 6), generator=torch.Generator().manual_seed(4))
    expected = program.run(fill(program, {"input_ids": ids}))
    parsed = Program.parse(str(program), program.weights)
    assert str(parsed) == str(program)
    save_program(program, tmp_path)
    names = [node.name for node in program.inputs]
    exported = from_exported(program.to_exported(), input_names=names, output_names=program.output_names)
    for other in (parsed, load_program(tmp_path), exported):
        outputs = other.run(fill(other, {"input_ids": ids}))
        assert all(torch.equal(outputs[name].float(), t.float()) for name, t in expected.items())
    feeds = fill(program, {"input_ids": ids})
    again = program.to_exported().module()(*(feeds[name] for name in names))
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(again, expected.values(), strict=True))


def test_eight_bits_change_little_and_four_more(embedded: Callable[[str], Program]) -> None:
    program = embedded("llama")
    with held_weights(program):
        text = generate(ProgramStepper(program), torch.ones(4, 1, dtype=torch.int64), 60, temperature=1.0)
    kl = []
    for spec in (K8, "int4 asym group=16 dynamic"):
        found = evaluate(quantized(program, spec, spec), program, data=text, quiet=True)
        assert found.kl is not None
        kl.append(found.kl.mean)
    assert 0 < kl[0] < 2e-4
    assert 10 * kl[0] < kl[1] < 0.05


def test_a_recipe_compiles_saves_and_generates(tmp_path: Path) -> None:
    model = qcompile.compile(zoo.path("llama"), {"kv_cache": K8})
    prompt = torch.tensor([[1, 40, 41, 42]])
    tokens = model.generate(prompt, 8)
    model.save(tmp_path / "saved")
    assert torch.equal(qcompile.load(tmp_path / "saved").generate(prompt, 8), tokens)


# ------------------------------------------------------------------------------------------------------- sliding windows

WINDOW = CACHE.replace(
    '{"y": y, "present_0_key": keys, "present_0_value": values}',
    '{"y": y, "present_0_key": kept, "present_0_value": values}',
).replace(
    "    values =", "    same = aten.slice.Tensor(keys, 1)\n    kept = aten.slice.Tensor(same, 2, -3)\n    values ="
)
"""A cache that keeps the last three keys."""


def test_a_window_of_codes_and_scales_is_kept() -> None:
    program = quantized(Program.parse(WINDOW), K8, None)
    x = torch.randn(1, 2, 5, 8)
    out = program.run({"x": x, **empty(program, 1)})
    whole = QuantSpec.parse(K8).quantize(-x)
    assert torch.equal(out["present_0_key"], whole.codes[:, :, 2:])
    assert torch.equal(out["present_0_key_scale"], whole.scale[:, :, 2:])
    assert "past_key_values_0_value_scale" not in [n.name for n in program.inputs]
