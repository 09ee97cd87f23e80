"""Calibration of programs that read other things than tokens, and documents padded to one length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from qcompile import compile as qc_compile
from qcompile.data import Batches, InputBatches, load_batches, load_inputs
from qcompile.data.batches import feeds
from qcompile.data.tokenizer import Encoding
from qcompile.driver import calibration_data
from qcompile.errors import QCompileError, RecipeError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.passes.quantize.calibrate import Calibrate
from qcompile.recipe import Recipe
from qcompile.recipe.model import Calibration

VISION = """def main(pixel_values: f32[batch, 3, 4, 4], *, w: f32[5, 48]):
    flat: f32[batch, 48] = aten.flatten.using_ints(pixel_values, 1, -1)
    classes: f32[batch, 5] = aten.linear.default(flat, w)
    return {"classes": classes}
"""
PAIRS = """def main(input_ids: i64[batch, sequence], attention_mask: i64[batch, sequence], token_type_ids: i64[batch, sequence],
         *, t: f32[9, 6]):
    x = aten.embedding.default(t, input_ids)
    y = aten.embedding.default(t, token_type_ids)
    z = aten.add.Tensor(x, y)
    m = aten.unsqueeze.default(attention_mask, -1)
    o = aten.mul.Tensor(z, m)
    return {"hidden": o}
""".replace(",\n         *", ", *")
CAUSAL = """def main(input_ids: i64[batch, sequence], *, t: f32[300, 6]):
    logits = aten.embedding.default(t, input_ids)
    return {"logits": logits}
"""


class Letters:
    """One token a character, its code point; token 1 begins a text."""

    bos_token_id, eos_token_id = 1, None

    def encode(self, text: str) -> Encoding:
        return Encoding([ord(c) for c in text], None)

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))


def images(*sizes: int) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(2)
    return [{"pixel_values": torch.randn(size, 3, 4, 4, generator=generator)} for size in sizes]


def test_a_vision_model_is_calibrated_on_mappings() -> None:
    data = images(3, 2, 2)
    recipe = {
        "weights": "int8 sym channel",
        "activations": "int8 sym static",
        "calibration": {"samples": 5},
        "verify": "off",
    }
    compiled = qc_compile(Program.parse(VISION), recipe, iter(data))
    scale = compiled.program.weights["flat.scale"]
    peak = torch.cat([batch["pixel_values"] for batch in data[:2]]).abs().max()
    assert float(scale) == pytest.approx(float(peak) / 127.5, rel=0.01)
    assert "calibrated on 5 samples of pixel_values, given data" in compiled.report.notes


def test_whole_batches_are_taken_until_there_are_enough() -> None:
    program = Program.parse(VISION)
    data = load_inputs(images(3, 2, 2), program, samples=4)
    assert isinstance(data, InputBatches)
    assert [len(batch["pixel_values"]) for batch in data] == [3, 2]
    arrays = load_inputs([{k: v.numpy() for k, v in b.items()} for b in images(3, 2, 2)], program, samples=4)
    assert arrays.fingerprint == data.fingerprint

    def endless() -> Any:
        while True:
            yield from images(1)

    assert load_inputs(endless(), program, samples=3).samples == 3


def test_an_encoder_is_given_all_of_its_inputs() -> None:
    program = Program.parse(PAIRS)
    ids = torch.tensor([[1, 2, 3], [4, 5, 0]])
    batch = {
        "input_ids": ids,
        "attention_mask": (ids > 0).long(),
        "token_type_ids": torch.tensor([[0, 0, 1], [0, 1, 0]]),
    }
    (given,) = load_inputs([batch], program, samples=2)
    outputs = program.run(fill(program, feeds(given)))
    table = program.weights["t"]
    expected = (table[ids] + table[batch["token_type_ids"]]) * batch["attention_mask"][..., None]
    assert torch.equal(outputs["hidden"], expected)


def test_inputs_that_are_not_the_programs_are_refused() -> None:
    vision, pairs, causal = map(Program.parse, (VISION, PAIRS, CAUSAL))
    ids = torch.ones(2, 3, dtype=torch.int64)
    refused: list[tuple[Program, Any, str]] = [
        (vision, [{"pixels": torch.zeros(2, 3, 4, 4)}], "batch 0 has 'pixels', the program takes .*: leave it out"),
        (vision, [images(2)[0] | {"labels": ids}], "'labels', the program takes"),
        (vision, [{"pixel_values": torch.zeros(2, 3, 4, 4).double()}], r"f64\[2, 3, 4, 4\]; .* f32\[batch, 3, 4, 4\]"),
        (vision, [{"pixel_values": torch.zeros(2, 3, 4, 5)}], r"f32\[2, 3, 4, 5\]; the program takes f32\[batch, 3"),
        (vision, images(1), "1 samples are less than 2; ask for samples=1"),
        (vision, [ids], "given data has 'input_ids', the program takes"),
        (vision, [images(2)[0], "text"], "mixes batches"),
        (vision, [{"a": "text"}], r"no text under 'text'; it has \['a'\]: give field="),
        (vision, images(2)[0], "data is a dict; give a path"),
        (pairs, [ids], "no 'token_type_ids', which the program takes: give data= with mappings of"),
        (pairs, [{"input_ids": ids, "token_type_ids": ids.int()}], "'token_type_ids' of i32"),
        (causal, [{"input_ids": ids, "attention_mask": ids.tril()}], "'attention_mask', .*: give packing='joined'"),
    ]
    for program, source, message in refused:
        with pytest.raises(QCompileError, match=message) as raised:
            load_inputs(source, program, samples=2, length=3)
        assert "\n" not in str(raised.value)
    with pytest.raises(QCompileError, match=r"has inputs \['pixel_values'\]; give token rows"):
        load_batches(images(2), samples=2)
    for source in (None, "a.txt", ids):
        with pytest.raises(QCompileError, match=r"takes \['pixel_values'\], not input_ids: give data= with mappings"):
            calibration_data([Calibrate()], Calibration(), source, vision)


# ---------------------------------------------------------------- documents, padded


@pytest.mark.parametrize("bos", ["none", "document", "sequence"])
def test_a_document_a_sequence(bos: Any) -> None:
    texts = ["abcdefgh", "", "ij", "klm", "n"]
    data = load_batches(texts, Letters(), samples=4, length=4, packing="documents", bos=bos)
    begin = "" if bos == "none" else "\x01"
    assert data.mask is not None
    spelled = [Letters().decode(ids[m.bool()].tolist()) for ids, m in zip(data.tokens, data.mask, strict=True)]
    assert sorted(spelled) == sorted((begin + text)[:4] for text in texts if text)
    assert not bool(data.tokens[data.mask == 0].any())
    again = load_batches(texts, Letters(), samples=4, length=4, packing="documents", bos=bos)
    other = load_batches(texts, Letters(), samples=4, length=4, seed=1, packing="documents", bos=bos)
    assert data.fingerprint == again.fingerprint != other.fingerprint
    assert data.describe().endswith(f"without padding), given data (seed 0, bos: {bos}, documents)")
    (one,) = load_batches((t for t in ["abcd"]), Letters(), samples=1, length=4, packing="documents")
    assert one.tolist() == [[97, 98, 99, 100]]  # nothing is padded


def test_documents_that_do_not_suffice_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one text " * 20)
    message = "a.txt has 1 documents with text; 2 samples need as many: ask for at most 1 samples, or packing='joined'"
    with pytest.raises(QCompileError, match=message):
        load_batches(path, Letters(), samples=2, length=4, packing="documents")
    with pytest.raises(QCompileError, match=r"0 documents with text; .* give more text"):
        load_batches([""], Letters(), samples=2, length=4, packing="documents")
    with pytest.raises(QCompileError, match="packing is 'padded'; give one of joined, documents"):
        load_batches(["a"], Letters(), samples=1, length=1, packing="padded")  # type: ignore[arg-type]
    rows = load_batches(torch.ones(2, 3, dtype=torch.int64), samples=2, length=3, packing="documents", bos="document")
    assert rows.describe() == "2 × 3 tokens, given tokens (rows as they are)"


def test_the_recipe_says_how_data_is_read(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"story": "ab" * n}) + "\n" for n in (1, 2, 3)))
    settings = [f"data={path}", "samples=3", "length=5", "bos=document", "packing=documents", "field=story", "batch=2"]
    recipe = Recipe().override([f"calibration.{setting}" for setting in settings])
    assert Recipe.parse(str(recipe)) == recipe
    text = CAUSAL.replace("sequence],", "sequence], attention_mask: i64[batch, sequence],", 1)
    program = Program.parse(text)
    program.info.update(bos_token_id=7, max_positions=4, tokenizer=Letters())
    data = calibration_data([Calibrate()], recipe.calibration, None, program)
    assert isinstance(data, Batches)
    a, b = 97, 98
    assert data.mask is not None
    kept = [ids[m.bool()].tolist() for ids, m in zip(data.tokens, data.mask, strict=True)]
    assert sorted(kept, key=len) == [[1, a, b], [1, a, b, a], [1, a, b, a]]
    assert [len(batch["input_ids"]) for batch in data] == [2, 1]
    assert calibration_data([], recipe.calibration, None, program) is None
    for bad, message in (("bos=always", "bos"), ("packing=padded", "packing"), ("fields=a", "field")):
        with pytest.raises(RecipeError, match=message):
            Recipe().override([f"calibration.{bad}"])


def test_mappings_of_text_are_documents() -> None:
    rows = [{"text": "ab", "id": 1}, {"text": "cd", "id": 2}]
    assert load_batches(rows, Letters(), samples=1, length=4).tokens.tolist() == [[97, 98, 99, 100]]
    assert load_batches([{"body": "xy"}], Letters(), samples=1, length=2, field="body").tokens.tolist() == [[120, 121]]
