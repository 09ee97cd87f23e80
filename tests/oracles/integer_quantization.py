"""Integer quantization one element at a time: plain loops over numpy scalars, sharing nothing with qcompile.numerics.

Takes the words of a spec as plain arguments. Arithmetic is that of `work` (numpy.float32 or numpy.float64).
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

LARGEST = {"float16": 65504.0, "bfloat16": 2.0**127 * (2 - 2.0**-7), "float32": 2.0**127 * (2 - 2.0**-23)}
LARGEST["float64"] = float(np.finfo(np.float64).max)


@dataclass(frozen=True)
class Words:
    """A spec taken apart."""

    bits: int
    signed: bool = True
    ternary: bool = False
    symmetric: bool = True
    range: str = "signed"
    scale: str = "f32"
    zero: str = "none"

    @property
    def codes(self) -> tuple[int, int]:
        if self.ternary:
            return -1, 1
        if not self.signed:
            return 0, 2**self.bits - 1
        narrow = self.symmetric and self.range == "narrow"
        return -(2 ** (self.bits - 1)) + (1 if narrow else 0), 2 ** (self.bits - 1) - 1


def scale_of(low: Any, high: Any, words: Words, work: type, dtype: str) -> Any:
    """The stored scale of a group whose entries lie in [low, high]."""
    share = 0.125 if words.scale.startswith("pow2") else 1 - 2.0**-words.bits
    reach = work(LARGEST[dtype] * share * (1 - 2.0**-7))
    low, high = (min(max(v, -reach), reach) for v in (low, high))
    qmin, qmax = words.codes
    if not words.symmetric:
        low, high = min(low, work(0)), max(high, work(0))
        with np.errstate(over="ignore"):
            width = high - low
        steps = work(qmax - qmin)
        step = width / steps if math.isfinite(width) else high / steps - low / steps
    elif not words.signed:
        step = max(high, work(0)) / work(qmax)
    elif words.range == "signed" and not words.ternary:
        step = (low if -low >= high else high) / work(qmin)
    else:
        half = 2.0 ** (words.bits - 1)
        step = max(-low, high) / work({"narrow": half - 1, "half": half - 0.5, "full": half}[words.range])
    return stored_scale(step if step != 0 else work(1), words.scale)


def stored_scale(step: Any, kind: str) -> Any:
    sign = -1.0 if step < 0 else 1.0
    size = abs(step)
    if kind.startswith("pow2"):
        exponent = math.floor(math.log2(float(size)))
        while 2.0**exponent > float(size):  # log2 rounds
            exponent -= 1
        while 2.0 ** (exponent + 1) <= float(size):
            exponent += 1
        above = float(size) / 2.0**exponent
        up = {"pow2": above > 1, "pow2(floor)": False, "pow2(round)": above >= 1.5, "pow2(midmax)": above**2 > 2}[kind]
        return np.float32(sign * 2.0 ** min(max(exponent + up, -126), 127))
    name = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[kind]
    least = 2.0**-24 if kind == "f16" else 2.0**-126
    kept = np.float32(min(max(float(size), least), LARGEST[name]))
    number = {"f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}[kind]
    return number(np.float32(sign) * kept)


def zero_of(low: Any, scale: Any, words: Words, work: type, dtype: str) -> Any:
    """The stored zero-point."""
    share = 0.125 if words.scale.startswith("pow2") else 1 - 2.0**-words.bits
    reach = work(LARGEST[dtype] * share * (1 - 2.0**-7))
    low = max(min(min(low, reach), work(0)), -reach)
    qmin, qmax = words.codes
    zero = work(qmin) - low / work(scale)
    zero = np.rint(zero) if words.zero == "int" else zero
    zero = min(max(zero, work(qmin)), work(qmax))
    if words.zero == "int":
        return int(zero)
    number = {"f16": np.float16, "bf16": ml_dtypes.bfloat16}.get(words.scale, np.float32)
    return number(zero)


def code_of(x: Any, scale: Any, zero: Any, words: Words, work: type) -> int:
    qmin, qmax = words.codes
    with np.errstate(over="ignore"):
        steps = work(x) / work(scale)
    if words.zero == "float":
        steps = np.rint(steps + work(zero))
    elif words.zero == "int":
        steps = np.rint(steps) + work(zero)
    else:
        steps = np.rint(steps)
    return int(min(max(steps, qmin), qmax))


def value_of(code: int, scale: Any, zero: Any, work: type) -> Any:
    return (work(code) - work(0 if zero is None else zero)) * work(scale)


def quantize(x: np.ndarray, blocks: tuple[int, ...], words: Words, dtype: str) -> tuple[np.ndarray, ...]:
    """Codes, scales, zero-points and values (in the work type) of `x`, cut into blocks of shape `blocks`."""
    work = np.float64 if dtype == "float64" else np.float32
    counts = tuple(n // b for n, b in zip(x.shape, blocks, strict=True))
    codes, values = np.zeros(x.shape, dtype=np.int64), np.zeros(x.shape, dtype=work)
    scales, zeros = np.zeros(counts, dtype=object), np.zeros(counts, dtype=object)
    for block in itertools.product(*(range(n) for n in counts)):
        inside = itertools.product(*(range(i * b, (i + 1) * b) for i, b in zip(block, blocks, strict=True)))
        places = list(inside)
        entries = [work(x[place]) for place in places]
        low, high = min(entries), max(entries)
        scale = scale_of(low, high, words, work, dtype)
        zero = None if words.symmetric else zero_of(low, scale, words, work, dtype)
        scales[block], zeros[block] = scale, zero
        for place, entry in zip(places, entries, strict=True):
            codes[place] = code_of(entry, scale, zero, words, work)
            values[place] = value_of(codes[place], scale, zero, work)
    return codes, scales, zeros, values


def percentile(values: list[float], percent: float) -> float:
    """Linear between the two nearest ranks."""
    ordered = sorted(values)
    place = percent / 100 * (len(ordered) - 1)
    rank = min(int(place), len(ordered) - 1)
    above = ordered[min(rank + 1, len(ordered) - 1)]
    return ordered[rank] + (above - ordered[rank]) * (place - rank)
