"""gguf: how quantized weights lie in the blocks of a GGUF file. No target of its own yet."""
