"""The combinations that make sense, family by family, and how far each is from random data.

The table in `docs/formats.md` is made from these (`benchmarks/formats_table.py`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from qcompile.errors import SpecError
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup
from qcompile.numerics.qtensor import sqnr_db
from qcompile.numerics.scale_type import MicroScale
from qcompile.numerics.spec import QuantSpec

WEIGHT = (4096, 4096)
"""The weight whose bits are counted."""

SAMPLE = (64, 4096)
"""The tensors whose error is measured."""

STACK = 8
"""Tensors in a stack, where a spec is for stacks."""

_MOST, _LONGEST = 1 << 24, 1 << 20  # elements, and entries of one axis


@dataclass(frozen=True)
class Family:
    """Specs to choose between, and what they have in common."""

    title: str
    about: str
    specs: tuple[str, ...]


def _all(*patterns: str, **choices: tuple[object, ...]) -> tuple[str, ...]:
    """Patterns with every choice filled in, canonical spelling, in order."""
    found = list(patterns)
    for name, values in choices.items():
        found = [f.replace(f"<{name}>", str(value)) for f in found for value in values]
    return tuple(dict.fromkeys(str(QuantSpec.parse(text)) for text in found))


_RULES = ("floor", "even", "ceil", "rceil", "noclip", "mse")


FAMILIES: tuple[Family, ...] = (
    Family(
        "Symmetric integers",
        "Codes and a scale. The range is `signed`, the default of weights.",
        _all("int<b> sym <g>", b=(8, 6, 5, 4, 3, 2), g=("channel", "group=128", "group=64", "group=32")),
    ),
    Family(
        "Two bits and less",
        "`int1` has the values −s and 0, `ternary` −s, 0 and s, `int1 asym zero=float` any two. The largest entry "
        "is a poor measure here: search.",
        (
            *_all("int2 asym <g> <o>", g=("group=128", "group=32"), o=("minmax", "golden")),
            *_all("ternary <g> <o>", g=("channel", "group=128", "group=32"), o=("absmax", "golden")),
            *_all("int1 <g> golden", "int1 asym <g> zero=float golden", g=("group=128", "group=32")),
        ),
    ),
    Family(
        "What sym means",
        "Four conventions for one scale; the fewer the bits, the more it matters.",
        _all("int<b> sym <r> group=128", b=(8, 4, 3, 2), r=("narrow", "half", "full", "signed")),
    ),
    Family(
        "Asymmetric integers",
        "Codes from the least entry to the greatest. `uint4 asym` is the same with codes from 0 on.",
        (
            *_all("int<b> asym <g>", b=(8, 4, 3, 2), g=("channel", "group=128", "group=32")),
            *_all("int<b> asym group=128 zero=float", "uint<b> asym group=128", b=(4, 3, 2)),
        ),
    ),
    Family(
        "How the range is chosen",
        "Observers. `mse` and `golden` look for the least squared error in each group; `hqo` has an l_p norm with "
        "p < 1 in view, which few outliers hardly change.",
        (
            *_all(
                "int<b> sym group=128 <o>",
                b=(4, 3),
                o=("absmax", "percentile=99.5", "mse", "mse=2.4", "golden", "hqo"),
            ),
            *_all("int4 asym group=128 <o>", o=("minmax", "percentile=99.5", "mse", "golden", "hqo")),
            *_all("int4 asym group=128 zero=float <o>", o=("mse", "hqo")),
            *_all("int8 sym <g> <o>", g=("tensor", "channel"), o=("absmax", "percentile=99.99", "mse")),
            *_all("e4m3fn channel <o>", o=("absmax", "mse")),
        ),
    ),
    Family(
        "Types of scale",
        "What a scale is stored as. Powers of two have no sign, so that the range is `half` (`narrow` for e8m0).",
        _all(
            "int4 sym group=32 <s>",
            s=(
                *("scale=f32", "scale=f16", "scale=bf16", "scale=e4m3", "scale=e4m3(bare)", "double=8x256"),
                *("double=8x256(sym)", "double=6x64", "scale=pow2", "scale=pow2(floor)", "scale=pow2(round)"),
                *("scale=pow2(midmax)", "scale=pow2 mse", "scale=e8m0"),
            ),
        ),
    ),
    Family(
        "Double quantization",
        "Scales, and zero-points, that are integers themselves, as in the K-quants of GGUF.",
        (
            *_all("int<b> asym group=32 double=6x8 zero=6x8", b=(5, 4)),
            *_all("int2 asym group=16 double=4x16 zero=4x16", "int3 sym group=16 double=6x16(sym)"),
            *_all("int6 sym group=16 double=8x16(sym)", "int4 asym group=64 double=8x256 zero=8x256"),
        ),
    ),
    Family(
        "Small floats",
        "One element a value, and a scale. Errors hardly depend on the granularity, for floats have exponents.",
        (
            *_all("<e> <g>", e=("e4m3fn", "e5m2", "e3m4"), g=("tensor", "channel", "block=128x128", "group=128")),
            *_all("<e> channel", e=("e4m3fnuz", "e5m2fnuz", "e4m3(plain)")),
            *_all("<e> <g>", e=("e2m3", "e3m2", "e2m1", "e1m2", "e3m0"), g=("channel", "group=32")),
        ),
    ),
    Family(
        "OCP microscaling (MX)",
        "32 values share a power of two. The rule in parentheses says which; `floor` when left out.",
        _all(
            *(f"{name}(<r>)" for name in ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2")),
            *("mxfp4(<r>)", "mxint8(<r>)"),
            r=_RULES,
        ),
    ),
    Family(
        "Scales in e4m3",
        "Scales with three bits of mantissa, and a float32 global scale: NVFP4 and its relatives.",
        _all(
            *("nvfp4", "nvfp4(mse)", "e2m1 group=16 scale=e4m3(bare)", "e2m1 group=32 scale=e4m3"),
            *("e2m3 group=16 scale=e4m3", "int4 sym group=16 scale=e4m3", "int4 sym group=16 scale=e4m3 mse"),
            "int3 sym group=16 scale=e4m3",
        ),
    ),
    Family(
        "Shared exponents",
        "Block floating point, and MX9, MX6 and MX4 with their microexponents (MX4 has no name here).",
        _all(
            *("bfp16", "bfp(block=16 bits=8)", "bfp(block=16 bits=6)", "bfp(block=16 bits=5)"),
            *("bfp(block=16 bits=4)", "bfp(block=32 bits=4)", "mx9", "mx6", "int3 sym group=2 scale=micro(16)"),
        ),
    ),
    Family(
        "Codebooks",
        "NF4 and FP4 of bitsandbytes; `double=8x256` is QLoRA's double quantization.",
        (
            *_all("<e> group=<g>", e=("nf4", "fp4"), g=(128, 64, 32)),
            *_all("nf4 group=64 <s>", s=("scale=bf16", "double=8x256", "mse", "double=8x256 mse")),
        ),
    ),
    Family(
        "Through another float",
        "Integers whose dequantized values are fp8, so that a kernel multiplies in fp8 (`via=`).",
        _all(
            *("int4 sym <g> via=e4m3fn", "int4 asym <g> via=e4m3fn", "int3 sym <g> via=e4m3fn"),
            *("int4 sym <g> via=e5m2", "e2m1 <g> via=e4m3fn"),
            g=("channel", "group=128", "group=32"),
        ),
    ),
    Family(
        "Activations, scales computed as the model runs",
        "A token is a row. One scale a tensor is one for all rows of a batch.",
        _all(
            *("int8 sym token dynamic", "int8 asym token dynamic", "int8 sym group=128 dynamic"),
            *("int8 sym tensor dynamic", "int6 asym token dynamic", "int4 sym token dynamic"),
            *("int4 asym token dynamic", "int4 asym group=128 dynamic", "e4m3fn token dynamic"),
            *("e4m3fn group=128 dynamic", "e4m3fn tensor dynamic", "e5m2 token dynamic", "mxfp8_e4m3 dynamic"),
            *("mxfp6_e2m3 dynamic", "mxfp4(even) dynamic", "mxint8 dynamic", "nvfp4 dynamic", "bfp16 dynamic"),
            *("mx9 dynamic", "mx6 dynamic"),
        ),
    ),
    Family(
        "Activations, scales from calibration data",
        "Scales that are known before the model runs; `no_scale` is a cast.",
        _all(
            *("int8 sym tensor static", "int8 asym tensor static", "uint8 asym tensor static"),
            *("int8 asym tensor static percentile=99.999", "int8 asym tensor static mse"),
            *("int8 sym channel static", "e4m3fn tensor static", "e4m3fn no_scale", "e5m2 no_scale"),
        ),
    ),
    Family(
        "Stacks of experts",
        f"Tensors of three axes, {STACK} experts here. `stack=0` gives each its own of what a tensor has one of.",
        _all(
            *("int4 sym channel axis=0,1", "e4m3fn channel axis=0,1", "nvfp4 stack=0"),
            "int4 sym group=128 via=e4m3fn stack=0",
        ),
    ),
)
"""Every family."""


def shape_for(spec: QuantSpec, shape: tuple[int, int]) -> tuple[int, ...]:
    """The least shape not below `shape` that the groups of `spec` divide, with `STACK` before it where it names a third
    axis.

    Raises SpecError where that is a tensor too large to try.
    """
    sizes = list(shape) if _rank(spec) == 2 else [STACK, *shape]
    match spec.granularity:
        case PerGroup(size, axis) if axis < len(sizes):
            step = math.lcm(size, spec.scale.block) if isinstance(spec.scale, MicroScale) else size
            sizes[axis] = -(-sizes[axis] // step) * step
        case PerBlock(rows, columns):
            sizes[-2:] = [-(-sizes[-2] // rows) * rows, -(-sizes[-1] // columns) * columns]
    if max(sizes) > _LONGEST:
        raise SpecError(f"{spec}: a tensor of {' × '.join(map(str, sizes))} is too large to try; use smaller groups")
    spec.parameters(sizes)
    return tuple(sizes)


def weight_bits(spec: QuantSpec) -> float:
    """Bits a value of a 4096 x 4096 weight (of `shape_for`), everything that is stored included."""
    return spec.bits_per_element(shape_for(spec, WEIGHT))


def sample_shape(spec: QuantSpec, shape: tuple[int, int] = SAMPLE) -> tuple[int, ...]:
    """The shape of the tensors that `errors` takes: about `shape`; SpecError where that would be too large to try."""
    rows, columns = shape
    sizes = shape_for(spec, shape if _rank(spec) == 2 else (rows // STACK, columns))
    if math.prod(sizes) > _MOST:
        sizes = shape_for(spec, (1, columns))
    if math.prod(sizes) > _MOST:
        raise SpecError(f"{spec}: a tensor of {' × '.join(map(str, sizes))} is too large to try; use smaller groups")
    return sizes


def errors(spec: QuantSpec, shape: tuple[int, int] = SAMPLE) -> dict[str, float]:
    """Relative squared error, sum (x - y)^2 / sum x^2, on float32 tensors of three kinds (see `samples`)."""
    found = {}
    for kind, x in samples(sample_shape(spec, shape)).items():
        found[kind] = 10 ** (-sqnr_db(x, spec.quantize(x).dequantize(torch.float32)) / 10)
    return found


@lru_cache(maxsize=4)
def samples(shape: tuple[int, ...]) -> dict[str, Tensor]:
    """Seeded float32 tensors: `gaussian` and `laplace` with a standard deviation of 1, and `outliers`: Gaussian, one
    value in 512 times 16.
    """
    random = torch.Generator().manual_seed(0)
    gaussian = torch.randn(shape, generator=random)
    sign = torch.randint(0, 2, shape, generator=random) * 2 - 1
    laplace = torch.empty(shape).exponential_(generator=random) * sign * 0.5**0.5
    large = torch.rand(shape, generator=random) < 1 / 512
    outliers = torch.randn(shape, generator=random) * torch.where(large, 16.0, 1.0)
    return {"gaussian": gaussian, "laplace": laplace, "outliers": outliers}


def _rank(spec: QuantSpec) -> int:
    """2, or 3 where `spec` names a third axis or a stack."""
    match spec.granularity:
        case PerChannel(axes):
            third = len(axes) > 1 or max(axes) > 1 or min(axes) < -2
        case PerGroup(axis=axis):
            third = axis > 1 or axis < -2
        case _:
            third = False
    return 3 if third or spec.stack is not None else 2
