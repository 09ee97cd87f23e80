"""gguf.quants: the types that it can write (in numpy, one thread)."""

from __future__ import annotations

from functools import partial

import gguf
from exchange import Format, main
from gguf import GGMLQuantizationType as Type

KINDS = {"Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32, "Q8_0": 32, "TQ1_0": 256, "TQ2_0": 256, "MXFP4": 32}
FORMATS = {
    name: Format(block, partial(gguf.quantize, qtype=Type[name]), partial(gguf.dequantize, qtype=Type[name]))
    for name, block in KINDS.items()
}
FORMATS["MXFP4"] = Format(32, FORMATS["MXFP4"].encode, FORMATS["MXFP4"].decode, lambda kept: kept.reshape(-1, 17)[:, 0])

if __name__ == "__main__":
    main("gguf", FORMATS, torch=False)
