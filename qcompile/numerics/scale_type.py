"""What a scale is stored as: the `scale` part of a spec, as frozen values that print and parse.

Scales are worked with as float32 *units*: what one stored scale stands for before its outer parameters apply.
`to_stored` keeps units as what goes into a file, `to_steps` turns stored scales into the float32 steps that values are
divided by.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal, TypeAlias, get_args

import torch

from qcompile.errors import SpecError, nearest

Rounding: TypeAlias = Literal["ceil", "floor", "round", "midmax"]
Rule: TypeAlias = Literal["floor", "even", "ceil", "rceil", "noclip", "bfp"]


@dataclass(frozen=True)
class FloatScale:
    """A float: `f32`, `f16` or `bf16`."""

    name: Literal["f32", "f16", "bf16"] = "f32"

    def __str__(self) -> str:
        return self.name


@dataclass(frozen=True)
class Pow2Scale:
    """A power of two near range / largest code: rounded up (`ceil`, so that nothing more clips), down (`floor`), to the
    nearest (`round`), or to the nearest in log2 (`midmax`). Held as float32, worth eight bits: it has no sign.

    At 8 bits rounding up is best by far (Gaussian, groups of 32: 41.7 dB against 23.3 for midmax); at 4 bits midmax
    leads by 1.2 dB.
    """

    rounding: Rounding = "ceil"

    def __str__(self) -> str:
        return "pow2" if self.rounding == "ceil" else f"pow2({self.rounding})"


@dataclass(frozen=True)
class E8M0Scale:
    """A power of two from 2^-127 to 2^127 or nan, stored as its biased exponent, chosen from the largest magnitude
    `amax` by a rule (OCP Microscaling Formats v1.0, section 6.3, and what other encoders do); emax is the exponent of
    the element's largest value:

    - `floor`: 2^(⌊log2 amax⌋ - emax), the rule of the specification; - `ceil`: 2^(⌈log2 amax⌉ - emax);
    - `even`: as floor, after rounding amax to the element's mantissa, half up; - `rceil`: 2^⌈log2(amax / largest)⌉;
    - `noclip`: as floor, and every step is 2^(emax + 1) / largest of it (4/3 for e2m1), so that nothing clips
      (FP-Quant); - `bfp`: as floor, one higher where the largest magnitude would round past the last code.
    """

    rule: Rule = "floor"

    def __str__(self) -> str:
        return "e8m0" if self.rule == "floor" else f"e8m0({self.rule})"


@dataclass(frozen=True)
class E4M3Scale:
    """An e4m3fn number. With `shared`, all scales of a tensor are multiples of 1 / global, one float32 beside them,
    global = 448 * largest / amax (as NVFP4 has it), so that the largest scale is stored as 448.
    """

    shared: bool = True

    def __str__(self) -> str:
        return "e4m3" if self.shared else "e4m3(bare)"


@dataclass(frozen=True)
class DoubleScale:
    """Integers of `bits` bits, unsigned, each standing for offset + code * step; float32 step and offset are shared by
    `group` neighbours in row-major order (the last group may be shorter). `symmetric`: no offset, signed codes.

    Double quantization (QLoRA, Dettmers et al. 2023, section 3).
    """

    bits: int = 8
    group: int = 256
    symmetric: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 8:
            raise SpecError(f"{self}: scales are quantized to 1 to 8 bits, not {self.bits}; write 8x256")
        if self.group < 1:
            raise SpecError(f"{self}: {self.group} is not a group size; write 8x256")
        if self.symmetric and self.bits == 1:
            raise SpecError(f"{self}: one symmetric bit holds no scale but 0; drop (sym), or use more bits")

    def __str__(self) -> str:
        return f"{self.bits}x{self.group}" + ("(sym)" if self.symmetric else "")


@dataclass(frozen=True)
class MicroScale:
    """A shared eight-bit exponent for `block` values, and one bit for each group that halves its step where the whole
    group lies below that exponent (shared microexponents, Rouhani et al. 2023, arXiv 2302.08007).
    """

    block: int = 16

    def __post_init__(self) -> None:
        if self.block < 2:
            raise SpecError(f"micro({self.block}) is no block of several groups; write micro(16)")

    def __str__(self) -> str:
        return f"micro({self.block})"


ScaleType: TypeAlias = FloatScale | Pow2Scale | E8M0Scale | E4M3Scale | DoubleScale | MicroScale

F32 = FloatScale()

_PLAIN: tuple[ScaleType, ...] = (
    *(FloatScale("f32"), FloatScale("f16"), FloatScale("bf16")),
    *(Pow2Scale(rounding) for rounding in get_args(Rounding)),
    *(E8M0Scale(rule) for rule in get_args(Rule)),
    *(E4M3Scale(), E4M3Scale(shared=False)),
)
SCALE_WORDS: dict[str, ScaleType] = {str(scale): scale for scale in _PLAIN}
_ALIASES: dict[str, ScaleType] = {"pow2(ceil)": Pow2Scale(), "e8m0(floor)": E8M0Scale()}

DTYPES = {"f32": torch.float32, "f16": torch.float16, "bf16": torch.bfloat16}


def parse_scale(word: str) -> ScaleType:
    """The scale type that a word after `scale=` names; SpecError lists the known ones."""
    if (found := {**SCALE_WORDS, **_ALIASES}.get(word)) is not None:
        return found
    if (micro := re.fullmatch(r"micro(?:\((\d+)\))?", word)) is not None:
        return MicroScale(int(micro[1] or 16))
    known = [*SCALE_WORDS, "micro(16)"]
    raise SpecError(
        f"unknown scale {word!r}{nearest(word, known)}; use scale={', scale='.join(known)}, or double=8x256"
    )


def parse_double(text: str, name: str) -> DoubleScale:
    """Read `8x256` or `8x256(sym)`, written after `name=`."""
    found = re.fullmatch(r"(\d+)x(\d+)(\(sym\))?", text)
    if found is None:
        raise SpecError(f"{name}={text} is not bits x group; write {name}=8x256, or {name}=8x256(sym)")
    return DoubleScale(int(found[1]), int(found[2]), found[3] is not None)


def scale_dtype(scale: ScaleType) -> torch.dtype:
    """The dtype of stored scales; powers of two are held as float32."""
    match scale:
        case FloatScale(name):
            return DTYPES[name]
        case E8M0Scale():
            return torch.float8_e8m0fnu
        case E4M3Scale():
            return torch.float8_e4m3fn
        case DoubleScale(symmetric=symmetric):
            return torch.int8 if symmetric else torch.uint8
        case MicroScale():
            return torch.uint8
    return torch.float32


def scale_bits(scale: ScaleType) -> int:
    """Bits that one stored scale takes, outer parameters not counted."""
    match scale:
        case FloatScale(name):
            return torch.finfo(DTYPES[name]).bits
        case DoubleScale(bits):
            return bits
        case MicroScale():
            return 1
    return 8


def scaling_min(scale: ScaleType) -> float:
    """The least magnitude of a scale: 2^-126, the least normal; 2^-24 for f16, whose subnormals are in daily use."""
    return 2.0**-24 if scale == FloatScale("f16") else 2.0**-126


def unsigned(scale: ScaleType) -> bool:
    """Whether the type holds no negative scale."""
    return isinstance(scale, Pow2Scale | E8M0Scale | MicroScale)
