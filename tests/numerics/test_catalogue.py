"""What the catalogue says about words, elements and combinations, against the parsers, ml_dtypes and slow references."""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import ml_dtypes
import numpy as np
import pytest
import torch
from oracles import block_formats, codebooks

from qcompile.cli.takers import reasons, takers, uses
from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec
from qcompile.numerics.catalogue import (
    GLOSSARY,
    all_elements,
    element_facts,
    named_formats,
    resolved,
    span,
    spelled_out,
)
from qcompile.numerics.criterion import CRITERIA
from qcompile.numerics.element import ELEMENTS
from qcompile.numerics.families import FAMILIES, errors, sample_shape, samples, shape_for, weight_bits
from qcompile.numerics.formats import NAMES
from qcompile.numerics.scale_type import SCALE_WORDS, Rule

PAGE = Path(__file__).parents[2] / "docs" / "formats.md"
MADE = PAGE.read_text().split("<!-- made by benchmarks/formats_table.py -->")[1].split("<!-- end of")[0]
SPECS = [text for family in FAMILIES for text in family.specs]


def test_every_word_that_parses_has_a_meaning() -> None:
    scales = {f"e8m0({rule})" for rule in get_args(Rule)} | {"e8m0"}
    assert set(SCALE_WORDS) - scales <= set(GLOSSARY["scale"])
    assert set(get_args(Rule)) <= set(GLOSSARY["scale rule"])
    assert set(CRITERIA) == set(GLOSSARY["observer"])
    assert [facts.name for facts in all_elements()] == list(ELEMENTS)
    assert set(named_formats()) == set(NAMES)
    with pytest.raises(SpecError) as refused:
        QuantSpec.parse("int4 nonsense")
    (listed,) = re.findall(r"after the element come (.*)", str(refused.value))
    known = {word for section in GLOSSARY.values() for word in section} | {"scale", "double", "zero", "group", "block"}
    assert {word.rstrip("=") for word in listed.split(", ")} <= known


@pytest.mark.parametrize("section", [*GLOSSARY])
def test_every_word_with_a_meaning_parses(section: str) -> None:
    around = {
        "symmetry": "int4 {}",
        "range": "int4 {}",
        "granularity": "int4 {}",
        "scale": "int4 group=2 {}",
        "scale rule": "mxfp4({})",
        "zero-point": "int4 zero={}",
        "when": "e4m3fn {}",
        "observer": "int4 {}",
        "more": "int4 {}",
    }[section]
    values = {"group=N": "group=8", "block=RxC": "block=8x8", "axis": "channel axis=1", "stack": "stack=0"}
    values |= {"via": "via=e4m3fn", "scaling_min": "scaling_min=1e-5", "minmax": "asym minmax"}
    values |= {"int": "int asym", "float": "float asym", "8x128": "8x128 asym"}
    for word in GLOSSARY[section]:
        text = around.format(values.get(word, word))
        if section == "scale":
            text = text.replace(word, word if "=" in word else f"scale={word}")
        if word == "bfp":
            text = "int4 group=8 scale=e8m0(bfp)"
        if "micro" in word:
            text = "int5 group=2 scale=micro(16)"
        assert QuantSpec.parse(str(QuantSpec.parse(text))) == QuantSpec.parse(text), text


@pytest.mark.parametrize(
    ("word", "peer"),
    [
        ("e4m3fn", ml_dtypes.float8_e4m3fn),
        ("e5m2", ml_dtypes.float8_e5m2),
        ("e4m3fnuz", ml_dtypes.float8_e4m3fnuz),
        ("e5m2fnuz", ml_dtypes.float8_e5m2fnuz),
        ("e2m1", ml_dtypes.float4_e2m1fn),
        ("e2m3", ml_dtypes.float6_e2m3fn),
        ("e3m2", ml_dtypes.float6_e3m2fn),
        ("int4", ml_dtypes.int4),
        ("uint2", ml_dtypes.uint2),
    ],
)
def test_facts_of_elements_equal_those_of_ml_dtypes(word: str, peer: type) -> None:
    facts = element_facts(word)
    if word.startswith(("int", "uint")):
        info = ml_dtypes.iinfo(peer)
        assert (facts.lowest, facts.largest, facts.values) == (info.min, info.max, 1 << facts.bits)
        return
    numbers = np.arange(1 << facts.bits, dtype=np.uint8).view(peer).astype(np.float64)
    finite = set(numbers[np.isfinite(numbers)].tolist())
    info = ml_dtypes.finfo(peer)
    assert (facts.lowest, facts.largest, facts.bits) == (float(info.min), float(info.max), info.bits)
    assert facts.smallest == float(info.smallest_subnormal)
    assert facts.values == len(finite)
    assert ("nan" in facts.special, "infinity" in facts.special) == (np.isnan(numbers).any(), np.isinf(numbers).any())


def test_spans_are_written_for_people() -> None:
    spans = {word: span(element_facts(word)) for word in ("int4", "uint1", "ternary", "int1", "e2m1", "e5m2")}
    assert spans["int4"] == "-8 to 7"
    assert (spans["uint1"], spans["ternary"], spans["int1"]) == ("0 to 1", "±1", "-1 to 0")
    assert (spans["e2m1"], spans["e5m2"]) == ("±6, least 0.5", "±57344, least 2^-16")


def test_named_formats_are_taken_apart() -> None:
    assert spelled_out(QuantSpec.parse("mxfp4(even)")) == "e2m1 group=32 scale=e8m0(even)"
    assert spelled_out(QuantSpec.parse("nvfp4(mse) stack=0")) == "e2m1 group=16 stack=0 scale=e4m3 mse"
    assert named_formats()["mx6"][0] == "int5 sym group=2 scale=micro(16)"
    for text in SPECS:
        spec = QuantSpec.parse(text)
        assert QuantSpec.parse(spelled_out(spec)) == spec


def test_every_field_is_explained_for_every_combination() -> None:
    for text in SPECS:
        fields = resolved(QuantSpec.parse(text))
        assert all(meaning for _, meaning in fields.values()), text
    fields = resolved(QuantSpec.parse("int4 asym group=32 double=6x8 zero=4x16"))
    assert fields["scale"] == ("double=6x8", "integers of 6 bits, with a float32 step and offset for each 8 neighbours")
    assert fields["zero"][1].startswith("integers of 4 bits in runs of 16")
    assert resolved(QuantSpec.parse("mxint8"))["range"] == ("narrow", "the lowest code is not used")
    assert "(2^b - 1)" in resolved(QuantSpec.parse("uint8 static"))["range"][1]
    assert resolved(QuantSpec.parse("int4 asym scale=f16 zero=float"))["zero"][1].endswith("float16")


def test_samples_are_what_they_are_called() -> None:
    data = samples((64, 4096))
    kurtosis = {kind: float((x**4).mean() / x.square().mean() ** 2) for kind, x in data.items()}
    assert kurtosis["gaussian"] == pytest.approx(3, rel=0.05)
    assert kurtosis["laplace"] == pytest.approx(6, rel=0.1)
    assert float(data["laplace"].std()) == pytest.approx(1, rel=0.02)
    assert float((data["outliers"].abs() > 8).double().mean()) == pytest.approx(0.617 / 512, rel=0.1)  # P(|N| > 1/2)
    assert torch.equal(samples.__wrapped__((2, 64))["gaussian"], samples((2, 64))["gaussian"])


def test_errors_equal_slow_references() -> None:
    def lost(x: torch.Tensor, y: np.ndarray) -> float:
        exact = x.double().numpy()
        return float(((exact - y) ** 2).sum() / (exact**2).sum())

    for kind, x in samples((8, 256)).items():
        blocks = x.numpy().reshape(-1, 32)
        mx = block_formats.mx(blocks, "e2m1", "even").values.reshape(x.shape)
        scale = np.abs(x.numpy()).max() / np.float32(127)
        narrow = np.clip(np.round(x.numpy() / scale), -127, 127) * scale.astype(np.float64)
        nf4 = codebooks.quantize(x.numpy().reshape(-1, 64), "nf4")[2].reshape(x.shape)
        for text, want in (("mxfp4(even)", mx), ("int8 narrow tensor", narrow), ("nf4 group=64", nf4)):
            assert errors(QuantSpec.parse(text), (8, 256))[kind] == pytest.approx(lost(x, want), rel=1e-5), text


def test_shapes_fit_the_spec() -> None:
    def shape(text: str) -> tuple[int, ...]:
        return shape_for(QuantSpec.parse(text), (100, 100))

    assert shape("int4") == (100, 100)
    assert shape("int4 group=96") == (100, 192)
    assert shape("int4 group=96 axis=0") == (192, 100)
    assert shape("int4 block=128x64") == (128, 128)
    assert shape("int5 group=2 scale=micro(16)") == (100, 112)
    assert shape("nvfp4 stack=0") == (8, 100, 112)
    assert shape("int4 channel axis=0,1") == (8, 100, 100)
    assert sample_shape(QuantSpec.parse("int4 group=300000")) == (1, 300000)
    for text in ("int4 group=3000000", "int4 block=100000x100000"):
        with pytest.raises(SpecError, match="too large to try"):
            sample_shape(QuantSpec.parse(text))


def test_targets_say_why_not() -> None:
    assert {"aoti", "onnx_qcdq", "torch_mlir", "triton"} <= set(takers(QuantSpec.parse("int4 group=32")))
    assert {"onnx_qcdq", "torch_mlir", "triton"} <= set(takers(QuantSpec.parse("int8 asym tensor static")))
    assert "aoti" not in takers(QuantSpec.parse("int8 asym tensor static"))
    assert uses(QuantSpec.parse("e4m3fn no_scale")) == ("weight", "activation")
    (why,) = reasons(QuantSpec.parse("int4 group=32 double=8x256"), "weight")["onnx_qcdq"]
    assert "scales that are quantized themselves" in why
    (why,) = reasons(QuantSpec.parse("int8 block=16x16 dynamic"), "activation")["onnx_qcdq"]
    assert "varies" in why


def page_rows() -> dict[str, list[list[str]]]:
    """The page's tables: family title → rows."""
    parts = re.split(r"^### (.*)$", MADE, flags=re.MULTILINE)[1:]
    tables = dict(zip(parts[::2], parts[1::2], strict=True))
    return {
        title: [
            [cell.strip(" `") for cell in line.strip("|").split("|")] for line in text.splitlines() if "| `" in line
        ]
        for title, text in tables.items()
    }


def test_the_page_has_every_combination_with_its_bits_and_targets() -> None:
    rows = page_rows()
    assert list(rows) == [family.title for family in FAMILIES]
    for family in FAMILIES:
        assert " ".join(family.about.split()) in " ".join(MADE.split())
        assert [row[0] for row in rows[family.title]] == list(family.specs)
        for text, bits, *_, targets in rows[family.title]:
            spec = QuantSpec.parse(text)
            assert str(spec) == text
            assert float(bits) == round(weight_bits(spec), 4), text
            assert targets == (", ".join(takers(spec)) or "–"), f"{text}: run benchmarks/formats_table.py --write"


def test_the_page_has_the_errors_that_are_measured() -> None:
    measured: dict[str, list[float]] = {}
    for text, _, *lost, _ in (row for rows in page_rows().values() for row in rows):
        measured.setdefault(text, [*errors(QuantSpec.parse(text)).values()])
        assert [float(x) for x in lost] == pytest.approx(measured[text], rel=0.01), text
