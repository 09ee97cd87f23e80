"""A model directory's config.json: read, checked, and resolved to a class of transformers and an element type."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from qcompile.capture.files import one_line, read_json, tokenizer_path
from qcompile.errors import CaptureError
from qcompile.ir.weights import ShardSource

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "max_sequence_length", "n_ctx")
_HALVES = (torch.float16, torch.bfloat16)


def read_config(directory: Path) -> PretrainedConfig:
    """The directory's configuration. Raises CaptureError for what cannot be captured, before weights are looked at."""
    from transformers import CONFIG_MAPPING, AutoConfig

    path = directory / "config.json"
    if not path.is_file():
        if any(directory.glob("*.gguf")):
            raise CaptureError(
                f"{directory} is a GGUF model, which is an output format here; give its safetensors origin"
            )
        raise CaptureError(f"{directory} has no config.json; give the directory of a transformers model")
    plain = read_json(path)
    model_type = plain.get("model_type")
    if not isinstance(model_type, str):
        raise CaptureError(f"{path} names no model_type; give the config.json of a transformers model")
    if model_type not in CONFIG_MAPPING:
        if "auto_map" in plain:
            raise CaptureError(
                f"{directory} ({model_type!r}) brings its own Python code (trust_remote_code), which is never run; "
                "load it yourself and give capture() the module with example inputs"
            )
        raise CaptureError(f"{path} names model_type {model_type!r}, unknown to transformers{_nearest(model_type)}")
    if quantized := plain.get("quantization_config"):
        method = quantized.get("quant_method", "unknown") if isinstance(quantized, dict) else quantized
        raise CaptureError(f"{directory} is quantized already ({method}); give the checkpoint it was made from")
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(directory, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # validation in transformers raises a dozen types
        raise CaptureError(f"{path} is not a valid {model_type} configuration: {one_line(error)}") from error
    return config


def _nearest(word: str) -> str:
    from transformers import CONFIG_MAPPING

    from qcompile.pass_base import nearest

    return f"{nearest(word, CONFIG_MAPPING)}; a newer transformers may know it"


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that config.json names, else the causal LM of its model type, else its base model.

    Raises CaptureError for encoder-decoders.
    """
    import transformers
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING, PreTrainedModel

    if config.is_encoder_decoder:
        raise CaptureError(
            f"{config.model_type!r} is an encoder-decoder; capture takes decoders and encoders: give its encoder or "
            "decoder as a module with example inputs"
        )
    for name in config.architectures or ():
        named = getattr(transformers, name, None)
        if isinstance(named, type) and issubclass(named, PreTrainedModel):
            return named
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING, MODEL_MAPPING):
        if type(config) in mapping:
            found: Any = mapping[type(config)]
            return found if isinstance(found, type) else found[0]
    raise CaptureError(f"transformers has no language model for {config.model_type!r}")


def resolve_dtype(
    asked: torch.dtype | str | None, config: PretrainedConfig, tensors: Mapping[str, ShardSource]
) -> torch.dtype:
    """The dtype to capture in; see `qcompile.capture`."""
    asked = parse_dtype(asked)
    if isinstance(asked, torch.dtype):
        return asked
    stored = config.dtype or getattr(config.get_text_config(), "dtype", None)
    if isinstance(stored, str):
        stored = getattr(torch, stored, None)
    if not isinstance(stored, torch.dtype):
        stored = next((t.dtype for t in tensors.values() if t.dtype.is_floating_point), torch.float32)
    return torch.float32 if asked is None and stored in _HALVES else stored


def parse_dtype(asked: torch.dtype | str | None) -> torch.dtype | str | None:
    """A dtype from its name; "auto" and None stay. Raises CaptureError for anything that is no floating-point dtype."""
    dtype = asked
    if isinstance(asked, str) and asked != "auto":
        dtype = getattr(torch, asked.removeprefix("torch."), None)
        if dtype is None:
            dtype = asked
    if dtype is None or dtype == "auto" or dtype in (*_HALVES, torch.float32, torch.float64):
        return dtype
    raise CaptureError(f"dtype {asked} is not one to capture in; give float32, float64, bfloat16, float16 or 'auto'")


def describe(config: PretrainedConfig, model: PreTrainedModel, directory: Path | None, source: str) -> dict[str, Any]:
    """What `program.info` says of a transformers model."""
    text = config.get_text_config()
    generation = {}
    if directory is not None and (directory / "generation_config.json").is_file():
        generation = read_json(directory / "generation_config.json")

    def token(name: str) -> Any:
        found = generation.get(name)
        return getattr(text, name, None) if found is None else found

    return {
        "model_type": config.model_type,
        "architecture": type(model).__name__,
        "source": source,
        "tokenizer": tokenizer_path(directory) if directory is not None else None,
        "dtype": str(model.dtype).removeprefix("torch."),
        "bos_token_id": token("bos_token_id"),
        "eos_token_id": token("eos_token_id"),
        "max_positions": next((int(n) for a in _POSITIONS if isinstance(n := getattr(text, a, None), int)), None),
        "vocab_size": getattr(text, "vocab_size", None),
        "config": json.loads(config.to_json_string(use_diff=False)),
        "notes": [],
    }
