"""AMD Quark: MX, BFP16, MX6 and MX9. It rounds without storing: one function from values to values."""

from __future__ import annotations

import quark.torch.kernel  # noqa: F401  registers torch.ops.quark; compiles its kernel the first time
import torch
from exchange import Format, main

MX = {
    "mxfp8_e4m3": "fp8_e4m3",
    "mxfp8_e5m2": "fp8_e5m2",
    "mxfp6_e3m2": "fp6_e3m2",
    "mxfp6_e2m3": "fp6_e2m3",
    "mxfp4": "fp4",
    "mxint8": "int8",
}


def rounding(block: int, kind: str, element: str = "", rule: str = "even") -> Format:
    return Format(block, lambda x: torch.ops.quark.non_scaled_fake_quantize(x, kind, element, -1, block, rule), None)


FORMATS = {
    f"{name}({rule})": rounding(32, "mx", element, rule)
    for name, element in MX.items()
    for rule in ("floor", "even", "ceil")
}
FORMATS |= {"bfp16": rounding(8, "bfp16"), "mx6": rounding(16, "mx6"), "mx9": rounding(16, "mx9")}

if __name__ == "__main__":
    main("amd-quark", FORMATS)
