"""Spec strings of floats, codebooks, block formats and compositions: what they mean, print, and refuse."""

from __future__ import annotations

import pytest

from qcompile.errors import SpecError
from qcompile.numerics import QuantSpec

MEANINGS = [
    ("mxfp4", "e2m1 group=32 scale=e8m0"),
    ("mxfp4(floor)", "e2m1 group=32 scale=e8m0(floor)"),
    ("mxfp4(even)", "e2m1 group=32 scale=e8m0(even)"),
    ("mxfp4(mse)", "e2m1 group=32 scale=e8m0 mse"),
    ("mxfp4(noclip)", "e2m1 group=32 scale=e8m0(noclip)"),
    ("mxfp8_e4m3(ceil)", "e4m3fn group=32 scale=e8m0(ceil)"),
    ("mxfp8_e5m2", "e5m2 group=32 scale=e8m0"),
    ("mxfp6_e2m3(rceil)", "e2m3 group=32 scale=e8m0(rceil)"),
    ("mxfp6_e3m2", "e3m2 group=32 scale=e8m0"),
    ("mxint8", "int8.6 group=32 scale=e8m0"),
    ("nvfp4", "e2m1 group=16 scale=e4m3"),
    ("nvfp4(mse)", "e2m1 group=16 scale=e4m3 mse"),
    ("bfp16", "int8 group=8 scale=e8m0(bfp)"),
    ("bfp(block=16 bits=6)", "int6 group=16 scale=e8m0(bfp)"),
    ("mx6", "int5 group=2 scale=micro(16)"),
    ("mx9", "int8 group=2 scale=micro"),
]


@pytest.mark.parametrize(("name", "meaning"), MEANINGS)
def test_names_stand_for_their_fields_and_print_back(name: str, meaning: str) -> None:
    spec = QuantSpec.parse(name)
    assert spec == QuantSpec.parse(meaning)
    assert str(spec) == name.replace("(floor)", "")
    assert QuantSpec.from_fields({"element": name}) == spec
    assert str(QuantSpec.parse(f"{name} axis=0 dynamic")) == f"{spec!s} axis=0 dynamic"


@pytest.mark.parametrize(
    ("text", "printed"),
    [
        ("e4m3", "e4m3fn channel"),
        ("e4m3fn token dynamic", "e4m3fn token dynamic"),
        ("e4m3fn dynamic", "e4m3fn token dynamic"),
        ("e5m2 tensor no_scale", "e5m2 no_scale"),
        ("nf4 group=64 double=8x256", "nf4 group=64 double=8x256"),
        ("int4 asym group=128 scale=f16 zero=int", "int4 asym group=128 scale=f16"),
        ("int4 asym group=32 scale=f16 zero=float observer=hqo", "int4 asym group=32 scale=f16 zero=float hqo"),
        ("e2m1 group=32 scale=e4m3", "e2m1 group=32 scale=e4m3"),
        ("e4m3fn block=128x128", "e4m3fn block=128x128"),
        ("int4 via=e4m3", "int4 sym channel via=e4m3fn"),
        ("int4 group=32 golden=2.4", "int4 sym group=32 golden=2.4"),
        ("int4 asym zero=8x128 double=6x64(sym)", "int4 asym channel double=6x64(sym) zero=8x128"),
        ("int4 scaling_min=1e-05", "int4 sym channel scaling_min=1e-05"),
        ("nvfp4 stack=0 mse", "nvfp4(mse) stack=0"),
        ("int4 group=8 scale=e8m0(bfp)", "bfp(block=8 bits=4)"),
    ],
)
def test_printed_form(text: str, printed: str) -> None:
    spec = QuantSpec.parse(text)
    assert str(spec) == printed
    assert QuantSpec.parse(printed) == spec


@pytest.mark.parametrize(
    ("text", "bits"),
    [
        ("mxfp4", 4.25),
        ("mxfp8_e4m3", 8.25),
        ("mxfp6_e3m2", 6.25),
        ("mxint8", 8.25),
        ("nvfp4", 4.5 + 32 / 4096),
        ("bfp16", 9.0),
        ("mx6", 6.0),
        ("mx9", 9.0),
        ("nf4 group=64", 4.5),
        ("nf4 group=64 double=8x256", 4 + 8 / 64 + 64 / 4096),
        ("e4m3fn block=32x32", 8 + 32 / 1024),
        ("int4 via=e4m3fn", 4 + 32 / 64 + 32 / 4096),
        ("int4 asym group=32 zero=4x64", 4 + (32 + 4) / 32 + 64 / (32 * 64)),
    ],
)
def test_bits_per_element(text: str, bits: float) -> None:
    assert QuantSpec.parse(text).bits_per_element((64, 64)) == pytest.approx(bits, abs=1e-12)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("mxfp4(evn)", "did you mean 'even'"),
        ("mxfp4 group=16", "write out what you mean"),
        ("mxfp4 scale=f32", "does not apply"),
        ("mxfp4 asym", "does not apply"),
        ("mxfp4(mse) absmax", "does not apply"),
        ("nvfp4(floor)", "takes nothing in parentheses but mse"),
        ("mx6(8)", "takes nothing in parentheses"),
        ("bfp(bits=9)", "2 to 8 bits"),
        ("bfp(size=9)", "block=8 bits=8"),
        ("e4m4", "e4m4"),
        ("e2m1 bits=8", "bits"),
        ("mxfp5", "unknown element"),
        ("e4m3fn asym", "has no zero-point"),
        ("nf4 asym", "has no zero-point"),
        ("e4m3fn half", "is for integers"),
        ("nf4 scale=e8m0", "use scale=f32"),
        ("int4 asym scale=e8m0", "use sym"),
        ("int4 signed scale=pow2", "scales with a sign"),
        ("uint4 scale=e8m0", "signed integers"),
        ("e2m1 scale=e8m0(bfp)", "plain integers"),
        ("e2m1 scale=micro", "plain integers"),
        ("int8 group=16 scale=micro(16)", "use group=2"),
        ("int8 group=2 scale=micro mse", "drop the observer"),
        ("int8.6 group=32", "scale=e8m0"),
        ("int8 no_scale", "casts to a float"),
        ("e4m3fn no_scale group=32", "nothing to choose"),
        ("int4 double=8x256 scale=f16", "keep one"),
        ("int4 double=9x256", "1 to 8 bits"),
        ("int4 double=8", "bits x group"),
        ("int4 double=8x256 dynamic", "for weights"),
        ("int4 asym zero=half", "unknown zero"),
        ("int4 sym zero=8x128", "sym has no zero-point"),
        ("int8 via=e4m3fn", "no more bits"),
        ("int4 via=int8", "no float element"),
        ("int4 group=32 via=e4m3fn scale=e4m3", "use scale=f32"),
        ("int4 via=e4m3fn dynamic", "for weights"),
        ("int8 dynamic hqo", "hqo is for weights"),
        ("e2m1 hqo", "hqo is for integers"),
        ("int4 hqo scale=pow2", "hqo needs scales that are floats"),
        ("mxfp4 golden", "use mse"),
        ("int4 scaling_min=0", "small positive"),
        ("mxfp4 scaling_min=1e-3", "scales that are floats"),
        ("int4 scaling_min=x", "not a number"),
        ("int4 scale=e8", "unknown scale"),
        ("mxfp4 static", "use dynamic, tensor or channel"),
    ],
)
def test_impossible_specs_are_refused_with_a_way_out(text: str, said: str) -> None:
    with pytest.raises(SpecError) as caught:
        QuantSpec.parse(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "changes", "printed"),
    [
        ("mxfp4", {"group": 16}, "e2m1 group=16 scale=e8m0"),
        ("mxfp4", {"scale": "e8m0(even)"}, "mxfp4(even)"),
        ("mxfp4(even)", {"element": "nvfp4"}, "nvfp4"),
        ("int4 sym group=128", {"element": "mxfp4"}, "mxfp4"),
        ("int4 asym group=32", {"element": "e2m1"}, "e2m1 group=32"),
        ("nf4 group=64 double=8x256", {"double": None}, "nf4 group=64"),
        ("nf4 group=64 double=8x256", {"scale": "f16"}, "nf4 group=64 scale=f16"),
        ("int4 group=32 scale=f16", {"double": "8x64"}, "int4 sym group=32 double=8x64"),
        ("nvfp4", {"mse": 2.0}, "nvfp4(mse)"),
        ("bfp16", {"granularity": "channel"}, "int8 sym channel scale=e8m0(bfp)"),
        ("mxfp4", {"granularity": "tensor"}, "e2m1 tensor scale=e8m0"),
        ("int4", {"via": "e4m3fn"}, "int4 sym channel via=e4m3fn"),
    ],
)
def test_single_fields_can_be_overridden(text: str, changes: dict[str, object], printed: str) -> None:
    assert str(QuantSpec.parse(text).with_fields(changes)) == printed
