"""hf: how quantized weights lie in the safetensors files that transformers and vLLM read. No target of its own yet."""
