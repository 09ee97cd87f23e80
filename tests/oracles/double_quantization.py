"""Scales that are themselves quantized: integers of a few bits per run of neighbours, one float32 step (and offset) a run."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray


class Stored(NamedTuple):
    """Codes in the shape of the scales; a step and, where asymmetric, an offset per run; the scales read back."""

    codes: NDArray[np.int64]
    step: NDArray[np.float32]
    offset: NDArray[np.float32] | None
    values: NDArray[np.float32]


def quantize_scales(scales: NDArray[np.float32], bits: int, run: int = 256, symmetric: bool = False) -> Stored:
    """Runs of `run` scales in row-major order, the last one shorter where they do not divide. All in float32.

    asym: offset = least, step = (greatest - least) / (2^bits - 1), code = rint((scale - offset) / step) in 0…2^bits - 1,
    value = offset + code · step. sym: with a negative scale in the run, step = absmax / (2^(bits-1) - 1) and codes
    are signed and narrow; without one, step = greatest / (2^bits - 1) and codes count from 0; value = code · step.
    A step of 0 gives codes of 0.
    """
    flat = scales.reshape(-1).astype(np.float32)
    codes, values = np.zeros(flat.shape, dtype=np.int64), np.zeros_like(flat)
    steps, offsets = [], []
    for start in range(0, len(flat), run):
        part = slice(start, start + run)
        some = flat[part]
        offset = np.float32(0) if symmetric else some.min()
        signed = symmetric and some.min() < 0
        high = 2 ** (bits - 1) - 1 if signed else 2**bits - 1
        step = np.float32((np.abs(some).max() if symmetric else some.max() - offset) / np.float32(high))
        if step > 0:
            codes[part] = np.clip(np.rint((some - offset) / step), -high if signed else 0, high)
        values[part] = offset + codes[part].astype(np.float32) * step
        steps.append(step)
        offsets.append(offset)
    step_array, offset_array = np.array(steps, dtype=np.float32), np.array(offsets, dtype=np.float32)
    return Stored(
        codes.reshape(scales.shape), step_array, None if symmetric else offset_array, values.reshape(scales.shape)
    )
