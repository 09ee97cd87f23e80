"""torch_mlir: how quantized weights lie in the constants of torch dialect MLIR. No target of its own yet."""
