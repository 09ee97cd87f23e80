"""Codebook elements: NF4 of the QLoRA paper (arXiv 2305.14314) and FP4 as bitsandbytes has it, with an absmax scale."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

# fmt: off
NF4 = np.array([
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
], dtype=np.float32)
# fmt: on
_HALF = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], dtype=np.float32) / np.float32(12)
FP4 = np.concatenate([_HALF, -_HALF])  # code 8 is -0
BOOKS = {"nf4": NF4, "fp4": FP4}


def quantize(x: NDArray[np.float32], book: str) -> tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float32]]:
    """Scale (absmax of the last axis; 1 where it is 0), codes and values; float32.

    y = x / scale; the nearest entry, of two the lower value; 0 becomes the first code whose value is 0, so -0 of fp4 is
    never written. Values are entry · scale.
    """
    values = BOOKS[book]
    amax = np.max(np.abs(x), axis=-1)
    scale = np.where(amax == 0, np.float32(1), amax)
    y = (x / scale[..., None]).astype(np.float64)
    order: NDArray[Any] = np.argsort(values, kind="stable")  # -0 stands behind 0
    codes = np.zeros(x.shape, dtype=np.uint8)
    least = np.full(x.shape, np.inf)
    for code in order:
        error = np.abs(y - np.float64(values[code]))
        codes, least = np.where(error < least, np.uint8(code), codes), np.minimum(error, least)
    return scale, codes, values[codes] * scale[..., None]
