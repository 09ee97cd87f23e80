"""bitsandbytes on the CPU: NF4 and FP4, plain and with its own quantized scales."""

from __future__ import annotations

from bitsandbytes.functional import dequantize_4bit, quantize_4bit
from exchange import Format, main


def four_bits(kind: str, nested: bool) -> Format:
    return Format(
        64,
        lambda x: quantize_4bit(x, blocksize=64, compress_statistics=nested, quant_type=kind),
        lambda kept: dequantize_4bit(*kept),
    )


FORMATS = {
    f"{kind} group=64{' nested' if nested else ''}": four_bits(kind, nested)
    for kind in ("nf4", "fp4")
    for nested in (False, True)
}

if __name__ == "__main__":
    main("bitsandbytes", FORMATS)
