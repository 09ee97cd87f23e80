"""`genai_config.json`: what onnxruntime-genai needs to know to run a decoder.

onnxruntime-genai 0.18 makes the cache itself: an empty key and value for each layer, of the first key's type and with
`head_size` as their last dim. So it runs caches of codes with static scales, packed ones too, where keys and values are
stored alike; scales as inputs it does not know.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from qcompile.ir.program import Program

_KINDS = ("llama", "mistral", "qwen2", "qwen3", "phi", "phi3", "gemma", "gemma2", "gemma3_text", "granite", "olmo")
"""Model types that onnxruntime-genai runs as a plain decoder; any other is declared as llama, which is one."""


def write_genai_config(program: Program, directory: Path) -> str | None:
    """Write the file if `program` is a captured decoder whose key-value cache onnxruntime-genai can hold.

    Returns a note for the manifest; None for a program that is no decoder with a cache.
    """
    config = program.info.get("config")
    layers = sum(name.endswith("_key") and name.startswith("present_") for name in program.output_names)
    if not config or not layers or "logits" not in program.output_names:
        return None
    if (reason := _why_not(program)) is not None:
        return f"no genai_config.json: onnxruntime-genai {reason}"
    path = directory / "genai_config.json"
    path.write_text(json.dumps(_config(program, config, layers), indent=2) + "\n", encoding="utf-8")
    return "genai_config.json is for onnxruntime-genai"


def _why_not(program: Program) -> str | None:
    """What onnxruntime-genai cannot do with the cache, and the way out."""
    past = [node for node in program.inputs if node.name.startswith("past_key_values_")]
    if any(not node.name.endswith(("_key", "_value")) for node in past):
        return "feeds a cache no scales; use a static kv_cache for it"
    values = [node.meta["val"] for node in past]
    if len({(value.dtype, *value.shape[1::2]) for value in values}) > 1:
        return "wants keys and values of one type and shape; give both one spec for it"
    return None


def _config(program: Program, config: dict[str, Any], layers: int) -> dict[str, Any]:
    info = program.info
    inputs = {node.name for node in program.inputs}
    key = next(node for node in program.inputs if node.name == "past_key_values_0_key").meta["val"]
    decoder_inputs = {name: name for name in ("input_ids", "attention_mask", "position_ids") if name in inputs}
    end = info.get("eos_token_id")
    kind = info.get("model_type")
    return {
        "model": {
            "type": kind if kind in _KINDS else "llama",
            "bos_token_id": info.get("bos_token_id"),
            "eos_token_id": end,
            "pad_token_id": config.get("pad_token_id") or (end[0] if isinstance(end, list) else end),
            "context_length": info.get("max_positions"),
            "vocab_size": info.get("vocab_size"),
            "decoder": {
                "filename": "model.onnx",
                "session_options": {"provider_options": []},
                "head_size": int(key.shape[-1]),
                "hidden_size": config.get("hidden_size"),
                "num_attention_heads": config.get("num_attention_heads"),
                "num_key_value_heads": int(key.shape[1]),
                "num_hidden_layers": layers,
                "inputs": {
                    **decoder_inputs,
                    "past_key_names": "past_key_values.%d.key",
                    "past_value_names": "past_key_values.%d.value",
                },
                "outputs": {
                    "logits": "logits",
                    "present_key_names": "present.%d.key",
                    "present_value_names": "present.%d.value",
                },
            },
        },
        "search": {"do_sample": False, "max_length": info.get("max_positions"), "past_present_share_buffer": False},
    }
