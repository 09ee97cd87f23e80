"""Spec strings and fields: round trips, defaults, refusals."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec
from qcompile.numerics.criterion import AbsMax, LeastError, MinMax, Percentile
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken

ELEMENTS = [f"{sign}int{bits}" for sign in ("", "u") for bits in range(1, 9)] + ["ternary"]


@st.composite
def spec_words(draw: st.DrawFn) -> list[str]:
    """The words of a possible spec, in the documented order, any of them left out."""
    element = draw(st.sampled_from(ELEMENTS))
    symmetric = element == "ternary" or draw(st.booleans())
    when = draw(st.sampled_from(["", "static", "dynamic"]))
    ranges = ["signed", "half", "full", "narrow"] if symmetric and element.startswith("int") else [""]
    ranges = ["signed", "full"] if symmetric and element == "int1" else ranges
    observers = ["", "percentile", "percentile=99.5", "mse", "mse=2.4", "absmax" if symmetric else "minmax"]
    free = ["token", "group=32", "group=8 axis=0", "block=4x16"]
    wide = ["", "tensor", "channel", "channel axis=1", "channel axis=0,1"]
    granularity = draw(st.sampled_from(wide + (free if when != "static" else [])))
    words = [
        element,
        draw(st.sampled_from(["", "sym"])) if symmetric else "asym",
        draw(st.sampled_from(ranges)),
        granularity,
        draw(st.sampled_from(["", "scale=f16", "scale=bf16", "scale=pow2", "scale=pow2(floor)", "scale=pow2(midmax)"])),
        draw(st.sampled_from(["", "zero=none"] if symmetric else ["", "zero=int", "zero=float"])),
        when,
        draw(st.sampled_from(observers)),
    ]
    if "scale=pow2" in words[4] and words[2] == "signed":
        words[2] = "half"
    if "scale=pow2" in words[4] and element == "int1" and symmetric:
        words[2] = "full"
    if element == "int1" and symmetric and words[6]:
        words[2] = words[2] or "full"
    return " ".join(words).split()


@settings(max_examples=400, deadline=None)
@given(spec_words(), st.randoms(use_true_random=False))
def test_specs_print_and_parse_back_with_words_in_any_order(words: list[str], chance: random.Random) -> None:
    spec = QuantSpec.parse(" ".join(words))
    assert QuantSpec.parse(str(spec)) == spec
    assert QuantSpec.from_fields(spec.fields()) == spec
    assert spec.with_fields({}) == spec
    assert hash(spec) == hash(QuantSpec.parse(str(spec)))
    rest = words[1:]
    chance.shuffle(rest)
    assert QuantSpec.parse(" ".join([words[0], *rest])) == spec


@settings(max_examples=200, deadline=None)
@given(spec_words(), spec_words())
def test_specs_that_print_alike_are_alike(one: list[str], other: list[str]) -> None:
    a, b = QuantSpec.parse(" ".join(one)), QuantSpec.parse(" ".join(other))
    assert (str(a) == str(b)) == (a == b)


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("int4 sym group=128", "int4 sym group=128"),
        ("int4 group=128 sym signed scale=f32", "int4 sym group=128"),
        ("int8 sym token dynamic", "int8 sym token dynamic"),
        ("int8 dynamic half", "int8 sym token dynamic"),
        ("int8 static", "int8 sym tensor static"),
        ("int4", "int4 sym channel"),
        ("int4 half", "int4 sym half channel"),
        ("uint8 asym observer=mse", "uint8 asym channel mse"),
        ("int4 asym group=32 scale=f16 zero=float observer=mse=2.4", "int4 asym group=32 scale=f16 zero=float mse=2.4"),
        ("int8 percentile=99.999 scale=pow2(ceil)", "int8 sym channel scale=pow2 percentile=99.999"),
        ("int4 asym group=32 zero=int axis=0 minmax", "int4 asym group=32 axis=0"),
    ],
)
def test_printed_form_leaves_defaults_out(text: str, printed: str) -> None:
    assert str(QuantSpec.parse(text)) == printed


def test_defaults_depend_on_what_is_quantized() -> None:
    weight, dynamic, static = (QuantSpec.parse(f"int8 {when}") for when in ("", "dynamic", "static"))
    assert (weight.range, weight.granularity) == ("signed", PerChannel((0,)))
    assert (dynamic.range, dynamic.granularity) == ("half", PerToken())
    assert (static.range, static.granularity) == ("half", PerTensor())
    assert QuantSpec.parse("int8 channel static").granularity == PerChannel((-1,))
    assert QuantSpec.parse("int4 group=32").granularity == PerGroup(32, -1)
    assert QuantSpec.parse("int4 block=2x3").granularity == PerBlock(2, 3)
    assert (weight.observer, QuantSpec.parse("int8 asym").observer) == (AbsMax(), MinMax())
    assert QuantSpec.parse("int8 percentile").observer == Percentile(99.999)
    assert QuantSpec.parse("int8 mse").observer == LeastError(2.0)
    assert QuantSpec.parse("uint4").range == "full"
    assert QuantSpec.parse("ternary").range == "narrow"


@pytest.mark.parametrize(
    ("text", "codes", "storage"),
    [
        ("int4", (-8, 7), torch.int8),
        ("int4 narrow", (-7, 7), torch.int8),
        ("int4 half", (-8, 7), torch.int8),
        ("int8 asym", (-128, 127), torch.int8),
        ("uint3 asym", (0, 7), torch.uint8),
        ("uint8", (0, 255), torch.uint8),
        ("int1", (-1, 0), torch.int8),
        ("uint1", (0, 1), torch.uint8),
        ("ternary", (-1, 1), torch.int8),
    ],
)
def test_code_ranges(text: str, codes: tuple[int, int], storage: torch.dtype) -> None:
    spec = QuantSpec.parse(text)
    assert (spec.qmin, spec.qmax) == codes
    assert spec.storage == storage


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "unknown element ''"),
        ("int9", "1 to 8 bits, not 9"),
        ("sym int4", "unknown element 'sym'"),
        ("int4 sim", "did you mean 'sym'"),
        ("int4 grop=32", "did you mean 'group'"),
        ("int4 chanel", "did you mean 'channel'"),
        ("int4 scale=fp16", "did you mean 'f16'"),
        ("int4 group", "did you mean 'group='"),
        ("int4 observer=mean", "observers are absmax"),
        ("int4 sym asym", "sets symmetry again"),
        ("int4 tensor channel", "sets granularity again"),
        ("int4 group=32 tensor", "keep one"),
        ("int4 group=32 block=2x2", "keep one"),
        ("int4 mse percentile=99", "keep one"),
        ("int4 group=x", "not an integer"),
        ("int4 group=0", "not a group size"),
        ("int4 group=-1", "channel for one group per row"),
        ("int4 block=4", "block=128x128"),
        ("int4 block=0x4", "at least 1"),
        ("int4 tensor axis=1", "means nothing to tensor"),
        ("int4 group=4 axis=0,1", "one axis"),
        ("int4 channel axis=0,0", "each axis once"),
        ("int4 channel axis=a", "not an axis"),
        ("uint4 signed", "use int4"),
        ("uint4 half", "needs negative codes"),
        ("uint4 narrow", "needs negative codes"),
        ("int4 asym half", "drop half"),
        ("int4 sym zero=int", "drop zero=int"),
        ("int4 asym zero=none", "drop zero=none"),
        ("int4 sym minmax", "use absmax"),
        ("int4 asym absmax", "use minmax"),
        ("int1 narrow", "rounds every value to 0"),
        ("int1 dynamic", "rounds every value to 0"),
        ("ternary asym", "int2 asym"),
        ("ternary signed", "use int2"),
        ("int8 token static", "use dynamic, tensor or channel"),
        ("int8 group=32 static", "use dynamic, tensor or channel"),
        ("int8 percentile=30", "(50, 100]"),
        ("int8 percentile=high", "needs a number"),
        ("int8 mse=0", "positive exponent"),
        ("int8 observer=absmax=3", "takes no value"),
    ],
)
def test_impossible_specs_are_refused_with_a_way_out(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        QuantSpec.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_constructor_refuses_too() -> None:
    spec = QuantSpec.parse("int4 group=8")
    with pytest.raises(SpecError, match="drop zero=int"):
        dataclasses.replace(spec, zero="int")
    with pytest.raises(SpecError, match="unknown range"):
        dataclasses.replace(spec, range="wide")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "printed"),
    [
        ({"group": 64}, "int4 sym group=64"),
        ({"bits": 3}, "int3 sym group=128 axis=0"),
        ({"element": "uint4"}, "uint4 sym group=128 axis=0"),
        ({"granularity": "channel"}, "int4 sym channel"),
        ({"block": [4, 8]}, "int4 sym block=4x8"),
        ({"axis": None}, "int4 sym group=128"),
        ({"symmetry": "asym"}, "int4 asym group=128 axis=0"),
        ({"symmetry": "asym", "zero": "float"}, "int4 asym group=128 axis=0 zero=float"),
        ({"when": "dynamic"}, "int4 sym group=128 axis=0 dynamic"),
        ({"percentile": 99}, "int4 sym group=128 axis=0 percentile=99.0"),
        ({"mse": 2.4}, "int4 sym group=128 axis=0 mse=2.4"),
        ({"scale": "f16", "range": "half"}, "int4 sym half group=128 axis=0 scale=f16"),
    ],
)
def test_single_fields_can_be_overridden(changes: dict[str, object], printed: str) -> None:
    assert str(QuantSpec.parse("int4 sym group=128 axis=0").with_fields(changes)) == printed


def test_a_changed_symmetry_resets_what_depended_on_it() -> None:
    assert (
        str(QuantSpec.parse("int4 asym zero=float group=8 minmax").with_fields({"symmetry": "sym"}))
        == "int4 sym group=8"
    )
    assert (
        str(QuantSpec.parse("int4 half channel axis=1").with_fields({"symmetry": "asym"})) == "int4 asym channel axis=1"
    )


def test_field_errors_name_the_field() -> None:
    with pytest.raises(SpecError, match=r"unknown spec field 'grp' \(did you mean 'group'\?\)"):
        QuantSpec.from_fields({"element": "int4", "grp": 3})
    with pytest.raises(SpecError, match="add element: int4"):
        QuantSpec.from_fields({"bits": 4})
    with pytest.raises(SpecError, match="ternary has no other width"):
        QuantSpec.from_fields({"element": "ternary", "bits": 4})
    with pytest.raises(SpecError, match="1 to 8 bits"):
        QuantSpec.from_fields({"element": "int4", "bits": 9})


def test_scale_shapes() -> None:
    def shape(text: str, *size: int) -> tuple[int, ...]:
        return QuantSpec.parse(text).scale_shape(size)

    assert shape("int4 tensor", 6, 8) == (1, 1)
    assert shape("int4", 6, 8) == (6, 1)
    assert shape("int4 channel axis=1", 6, 8) == (1, 8)
    assert shape("int4 channel axis=0,1", 3, 6, 8) == (3, 6, 1)
    assert shape("int4 group=4", 6, 8) == (6, 2)
    assert shape("int4 group=3 axis=0", 6, 8) == (2, 8)
    assert shape("int4 block=3x4", 5, 6, 8) == (5, 2, 2)
    assert shape("int8 dynamic", 2, 3, 8) == (2, 3, 1)
    assert shape("int8 static", 2, 3, 8) == (1, 1, 1)
    assert shape("int8 channel static", 2, 3, 8) == (1, 1, 8)
    assert shape("int4 tensor") == ()


def test_a_group_that_does_not_divide_is_refused_with_the_nearest_divisors() -> None:
    with pytest.raises(SpecError, match=r"size is 1100; the nearest divisors are 110 and 220"):
        QuantSpec.parse("int4 group=128").scale_shape((4, 1100))
    with pytest.raises(SpecError, match=r"nearest divisors are 96$"):
        QuantSpec.parse("int4 group=128").scale_shape((4, 96))
    with pytest.raises(SpecError, match=r"block=4x4 does not divide axis 0"):
        QuantSpec.parse("int4 block=4x4").scale_shape((6, 8))
    for text in ("int4", "int4 group=4", "int8 dynamic"):
        with pytest.raises(SpecError, match="use tensor"):
            QuantSpec.parse(text).scale_shape(())


def test_bits_per_element() -> None:
    def bits(text: str, *shape: int) -> float:
        return QuantSpec.parse(text).bits_per_element(shape)

    assert bits("int4 group=32", 8, 64) == 4 + 32 / 32
    assert bits("int4 group=32 scale=f16", 8, 64) == 4 + 16 / 32
    assert bits("int4 asym group=32 scale=f16", 8, 64) == 4 + (16 + 4) / 32
    assert bits("int4 asym group=32 scale=bf16 zero=float", 8, 64) == 4 + 32 / 32
    assert bits("int3 group=32 scale=pow2", 8, 64) == 3 + 8 / 32
    assert bits("int8 tensor", 8, 64) == 8 + 32 / 512
    assert bits("int8 tensor", 0, 64) == 8
