"""The operators of a lowered graph, one file a family: plan of launches, CPU reference, registration.

Importing this package registers them as `torch.ops.qcompile_triton`; Triton is not needed for that, nor to run them on
a CPU.
"""

from qcompile.backends.triton.ops import (
    attention,
    experts,
    hadamard,
    quantize_rows,
    quantized_linear,
    scaled_linear,
    weight_only,
)

__all__ = ["attention", "experts", "hadamard", "quantize_rows", "quantized_linear", "scaled_linear", "weight_only"]
