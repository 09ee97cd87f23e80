"""qcompile itself, timed as the peers are."""

from __future__ import annotations

from typing import Any

from exchange import Format, main

from qcompile.numerics import QuantSpec
from qcompile.numerics.granularity import PerGroup
from qcompile.numerics.scale_type import MicroScale

NAMES = (
    *("e4m3fn no_scale", "e5m2 no_scale", "e3m2 no_scale", "e2m3 no_scale", "e2m1 no_scale"),
    *("mxfp8_e4m3(floor)", "mxfp8_e4m3(even)", "mxfp8_e4m3(rceil)", "mxfp6_e3m2(floor)", "mxfp6_e3m2(even)"),
    *("mxfp6_e2m3(floor)", "mxfp6_e2m3(even)", "mxfp4(floor)", "mxfp4(even)", "mxint8(even)", "nvfp4"),
    *("bfp16", "mx6", "mx9", "nf4 group=64", "fp4 group=64", "nf4 group=64 double=8x256"),
    *("int4 sym group=128", "int4 asym group=128", "int8 sym group=128"),
    *("int4 sym group=32 scale=f16", "int5 sym group=32 scale=f16", "int8 sym group=32 scale=f16"),
)


def _format(name: str) -> Format:
    spec = QuantSpec.parse(name)
    block = spec.granularity.size if isinstance(spec.granularity, PerGroup) else 1
    if isinstance(spec.scale, MicroScale):
        block = spec.scale.block

    def decode(kept: Any) -> Any:
        return kept.dequantize()

    return Format(block, spec.quantize, decode)


if __name__ == "__main__":
    main("qcompile", {name: _format(name) for name in NAMES})
