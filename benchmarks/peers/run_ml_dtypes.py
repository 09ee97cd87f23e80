"""ml_dtypes: casts (in numpy, one thread)."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from exchange import Format, main


def cast(name: str) -> Format:
    dtype: Any = getattr(ml_dtypes, name)
    return Format(1, lambda x: x.astype(dtype), lambda codes: codes.astype(np.float32))


FORMATS = {
    "e4m3fn no_scale": cast("float8_e4m3fn"),
    "e5m2 no_scale": cast("float8_e5m2"),
    "e3m2 no_scale": cast("float6_e3m2fn"),
    "e2m3 no_scale": cast("float6_e2m3fn"),
    "e2m1 no_scale": cast("float4_e2m1fn"),
}

if __name__ == "__main__":
    main("ml_dtypes", FORMATS, torch=False)
