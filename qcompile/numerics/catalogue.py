"""What there is to choose from: every word of a spec string with its meaning, elements, and formats with their sources.

`qcompile formats` prints it, `docs/formats.md` explains it at length. A test holds it against the parsers, so that no
word is without a meaning.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cache

import torch

from qcompile.numerics import formats
from qcompile.numerics.element import ELEMENTS, Codebook, Element, FloatElement, IntElement, parse_element
from qcompile.numerics.granularity import PerBlock, PerChannel, PerGroup, PerTensor, PerToken
from qcompile.numerics.parameters import zero_type
from qcompile.numerics.scale_type import DoubleScale, E8M0Scale, MicroScale
from qcompile.numerics.spec import QuantSpec

GLOSSARY: dict[str, dict[str, str]] = {
    "symmetry": {
        "sym": "no zero-point: code 0 is 0; the default, and all there is for floats and codebooks",
        "asym": "a zero-point beside each scale, for integers: the codes cover min to max, 0 among them",
    },
    "range": {
        "narrow": "scale = amax / (2^(b-1) - 1); the lowest code is not used",
        "half": "scale = amax / (2^(b-1) - 1/2); default of activations and of scales without a sign",
        "full": "scale = amax / 2^(b-1); a positive largest entry clips by one step",
        "signed": "the entry of largest magnitude becomes -2^(b-1): the scale carries its sign; default of weights",
    },
    "granularity": {
        "tensor": "one scale for the whole tensor; default where static",
        "channel": "one scale for each output feature of a weight (default), or feature of an activation",
        "token": "one scale for each row of an activation; default where dynamic",
        "group=N": "one scale for N neighbours along the last axis, or along axis=",
        "block=RxC": "one scale for each block of R rows and C columns",
    },
    "scale": {
        "f32": "float32, the default",
        "f16": "float16",
        "bf16": "bfloat16",
        "pow2": "a power of two, rounded up so that nothing more clips; eight bits, no sign",
        "pow2(floor)": "a power of two, rounded down",
        "pow2(round)": "the nearest power of two",
        "pow2(midmax)": "the power of two that is nearest in log2",
        "e8m0": "a power of two from 2^-127 to 2^127, or nan; eight bits, no sign; its rule in parentheses",
        "e4m3": "e4m3fn numbers, multiples of one float32 global scale for each tensor",
        "e4m3(bare)": "e4m3fn numbers, without a global scale",
        "micro(16)": "an eight-bit exponent for 16 values, and one bit for each group that halves its step",
        "double=8x256": "integers of 8 bits, with a float32 step and offset for each 256 neighbours",
        "double=8x256(sym)": "signed integers of 8 bits, with a float32 step for each 256 neighbours",
    },
    "scale rule": {
        "floor": "2^(floor(log2 amax) - emax), the OCP rule and the default; what is beyond the largest value clips",
        "even": "as floor, after amax is rounded to the mantissa of the element, half up",
        "ceil": "2^(ceil(log2 amax) - emax); nothing clips",
        "rceil": "the least power of two with which nothing clips: 2^ceil(log2(amax / largest))",
        "noclip": "as floor, the step 2^(emax + 1) / largest times as wide (4/3 for e2m1), so that nothing clips",
        "bfp": "as floor, one higher where the largest entry would round past the last code; plain integers only",
        "mse": "floor or a neighbour of it, whichever has the least error; MX formats only, elsewhere an observer",
    },
    "zero-point": {
        "none": "no zero-point; what sym has",
        "int": "an integer in the range of the codes; default of asym",
        "float": "a number that need not be an integer, of the type of the scale, or float32 where that is no float",
        "8x128": "zero-points quantized as double= scales are, to 8 bits in runs of 128",
    },
    "when": {
        "static": "an activation whose scale comes from calibration data",
        "dynamic": "an activation whose scale is computed as the model runs",
        "no_scale": "a cast to a float element, without any scale",
    },
    "observer": {
        "absmax": "the largest magnitude; default of sym",
        "minmax": "the least and the greatest entry; default of asym",
        "percentile": "percentile=99.999: what all but the most extreme entries lie within",
        "mse": "the range with the least squared error in each group, on a grid; mse=2.4 for another norm",
        "golden": "the same by golden-section search; golden=2.4 for another norm",
        "hqo": "half-quadratic optimisation of the zero-point (asym) or the scale (sym), for weights",
    },
    "more": {
        "axis": "the axis that group runs along, or that channel keeps; axis=0,1 keeps two",
        "stack": "an axis that stacks tensors, as experts: what a tensor has one of, each of them has",
        "via": "values are rounded to this float as well, one scale a tensor, so that a kernel can compute in it",
        "scaling_min": "the least a float scale can be",
    },
}
"""Meanings of the words of a spec string, by what they say."""

SOURCES = {
    **dict.fromkeys(
        ("mxfp8_e4m3", "mxfp8_e5m2", "mxfp6_e2m3", "mxfp6_e3m2", "mxfp4", "mxint8"),
        "OCP Microscaling Formats (MX) v1.0",
    ),
    "nvfp4": "NVIDIA Blackwell's four-bit format",
    "bfp16": "block floating point with 8 values an exponent (AMD Quark's BFP16)",
    "bfp": "block floating point of any block and width",
    "mx6": "shared microexponents, arXiv 2302.08007",
    "mx9": "shared microexponents, arXiv 2302.08007",
}
"""Where each named format is defined."""

assert set(SOURCES) == set(formats.NAMES)


@dataclass(frozen=True)
class ElementFacts:
    """What an element can hold. `values` counts the numbers that differ; `smallest` is the least positive one."""

    name: str
    kind: str
    bits: int
    values: int
    lowest: float
    largest: float
    smallest: float | None
    special: str


@cache
def element_facts(word: str) -> ElementFacts:
    """The facts of an element, read off its codes. SpecError for a word that is none."""
    element = parse_element(word)
    numbers = _numbers(element)
    return ElementFacts(
        str(element),
        _kind(element),
        element.bits,
        len(numbers),
        min(numbers),
        max(numbers),
        min((n for n in numbers if n > 0), default=None),
        _special(element),
    )


def all_elements() -> list[ElementFacts]:
    """The facts of every common element."""
    return [element_facts(word) for word in ELEMENTS]


def spelled_out(spec: QuantSpec) -> str:
    """The spec string without the name of a format: `e2m1 group=32 scale=e8m0(even)` for `mxfp4(even)`."""
    plain = ("element", "symmetry", "range", "granularity", "when", "observer")
    return " ".join(str(value) if name in plain else f"{name}={value}" for name, value in spec.fields().items())


def named_formats() -> dict[str, tuple[str, str]]:
    """Every named format with what it stands for and where it is defined; defaults for what goes in parentheses."""
    return {name: (spelled_out(QuantSpec.parse(name)), source) for name, source in SOURCES.items()}


def resolved(spec: QuantSpec) -> dict[str, tuple[str, str]]:
    """Every field of a spec, defaults included: its value and what that means."""
    facts = element_facts(str(spec.element))
    fields = {
        "element": (
            str(spec.element),
            f"{facts.kind}; {span(facts)}, {facts.values} numbers" + (f"; {facts.special}" if facts.special else ""),
        ),
        "symmetry": _explained("symmetry", "sym" if spec.symmetric else "asym"),
        "range": (spec.range, _range(spec)),
        "granularity": _granularity(spec),
        "scale": _scale(spec),
        "zero": _zero(spec),
        "when": _explained("when", spec.when) if spec.when is not None else ("", "a weight"),
        "observer": (str(spec.observer), GLOSSARY["observer"][str(spec.observer).partition("=")[0]]),
    }
    for name in ("via", "stack", "scaling_min"):
        if (value := getattr(spec, name)) is not None:
            fields[name] = (str(value), GLOSSARY["more"][name])
    return fields


def span(facts: ElementFacts) -> str:
    """The numbers of an element from end to end, and the least positive one where that is not 1."""
    ends = f"±{facts.largest:g}" if facts.lowest == -facts.largest else f"{facts.lowest:g} to {facts.largest:g}"
    if facts.smallest in (None, 1):
        return ends
    mantissa, exponent = math.frexp(facts.smallest)
    least = f"2^{exponent - 1}" if mantissa == 0.5 and exponent < -2 else f"{facts.smallest:.4g}"
    return f"{ends}, least {least}"


def _numbers(element: Element) -> set[float]:
    if isinstance(element, IntElement):
        return {code * 2.0**-element.fraction for code in range(element.lowest, element.highest + 1)}
    values = element.decode(torch.arange(1 << element.bits, dtype=torch.uint8)).tolist()
    return {value for value in values if math.isfinite(value)}


def _kind(element: Element) -> str:
    match element:
        case IntElement(ternary=True):
            return "signed integer of two bits, -2 left out"
        case IntElement():
            kind = "signed integer" if element.signed else "unsigned integer"
            return f"{kind}, {element.fraction} bits of it behind the point" if element.fraction else kind
        case FloatElement():
            return f"float, bits of exponent {element.exponent}, of mantissa {element.mantissa}"
        case Codebook():
            return "table of values, those of bitsandbytes"


def _special(element: Element) -> str:
    if not isinstance(element, FloatElement) or element.flavour == "finite":
        return ""
    if element.flavour == "fnuz":
        return "nan; no -0"
    return "nan, infinity" if bool(torch.isinf(element.values).any()) else "nan"


def _explained(section: str, word: str) -> tuple[str, str]:
    return word, GLOSSARY[section][word]


def _range(spec: QuantSpec) -> str:
    if not isinstance(spec.element, IntElement) or not spec.symmetric:
        return "every code is used"
    if isinstance(spec.scale, E8M0Scale | MicroScale):
        return "the lowest code is not used" if spec.range == "narrow" else "every code is used"
    if not spec.element.signed:
        return "scale = greatest entry / (2^b - 1); negative entries become 0"
    return GLOSSARY["range"][spec.range]


def _granularity(spec: QuantSpec) -> tuple[str, str]:
    meanings = GLOSSARY["granularity"]
    match spec.granularity:
        case PerTensor() if spec.when == "no_scale":
            return "", "there is no scale to share"
        case PerChannel(axes) if len(axes) > 1:
            return f"channel axis={','.join(map(str, axes))}", "one scale for each index of these axes"
        case PerChannel(axes):
            return f"channel axis={axes[0]}", meanings["channel"]
        case PerGroup(size, axis):
            return f"group={size} axis={axis}", f"one scale for {size} neighbours along that axis"
        case PerBlock():
            return str(spec.granularity), meanings["block=RxC"]
        case PerTensor() | PerToken():
            return _explained("granularity", str(spec.granularity))


def _scale(spec: QuantSpec) -> tuple[str, str]:
    word, meanings = str(spec.scale), GLOSSARY["scale"]
    if spec.when == "no_scale":
        return "", "none: a cast"
    match spec.scale:
        case E8M0Scale(rule):
            return f"e8m0({rule})", f"a power of two, or nan; {GLOSSARY['scale rule'][rule]}"
        case DoubleScale(bits, group, symmetric):
            shared = "step" if symmetric else "step and offset"
            return f"double={word}", f"integers of {bits} bits, with a float32 {shared} for each {group} neighbours"
        case MicroScale(block):
            return word, meanings["micro(16)"].replace("16", str(block))
    return word, meanings[word]


def _zero(spec: QuantSpec) -> tuple[str, str]:
    if isinstance(spec.zero, DoubleScale):
        return str(spec.zero), f"integers of {spec.zero.bits} bits in runs of {spec.zero.group}, with float32 steps"
    word, meaning = _explained("zero-point", spec.zero)
    kind = str(zero_type(spec)[0]).removeprefix("torch.")
    return (word, meaning) if spec.symmetric else (word, f"{meaning}; {kind}")
