"""How segments are run. Nothing here imports torch: recipes hold these, too."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Settings:
    """How segments are run; the `calibration` of a recipe has the same fields.

    Args:
        propagate: what later segments are shown: what the program computes with the rounded weights so far, or what the
            float program computes.
        true_sequential: inside a segment, too, a product is looked at after those before it are rounded. Without it all
            of a segment are looked at together, which costs one more run of it.
        memory: GB of values between segments that are kept in memory; more goes to files.
        device: where segments are run and solved, as ``cuda``; None leaves them on the CPU.
        compute: ``bfloat16`` rounds both sides of a linear layer of float32, and its result, to bfloat16 while data is
            run, which is faster where the processor multiplies bfloat16. Sums and rounding stay float32.
        sums: ``int8`` adds up products of inputs (H and G) as 8-bit integers, four times as fast where the processor
            multiplies those (VNNI) and the same numbers everywhere; see `qcompile.calibration.integers`.
    """

    propagate: Literal["quantized", "float"] = "quantized"
    true_sequential: bool = True
    memory: float = 4.0
    device: str | None = None
    compute: Literal["float32", "bfloat16"] = "float32"
    sums: Literal["float32", "int8"] = "float32"
