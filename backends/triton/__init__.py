"""triton: how quantized weights lie in memory for kernels that unpack them tile by tile. No target of its own yet."""
