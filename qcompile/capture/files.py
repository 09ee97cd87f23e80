"""A model's files: found, and checked before anything is read from them. No pickle is ever opened."""

from __future__ import annotations

import json
import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from qcompile.errors import CaptureError
from qcompile.ir.weights import ShardSource

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLES = {".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"}
_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt")
_HUB_FILES = ["*.json", "*.safetensors", "tokenizer*", "*.model", "*.txt", "*.jinja"]
_CONVERT = (
    "convert it in a trusted environment with transformers: "
    "AutoModelForCausalLM.from_pretrained(DIR).save_pretrained(NEW_DIR)"
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
    "C64": torch.complex64,
}
"""Element types of the safetensors format."""


def find_directory(source: str | Path) -> Path:
    """The local directory of a model: `source` itself, or the snapshot of a hub id such as ``org/name``.

    Raises CaptureError where neither exists, or where `source` is a file that is not a model directory.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    if path.is_file():
        raise CaptureError(_about_file(path))
    text = str(source)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", text) and not text.endswith("/"):
        return _snapshot(text)
    raise CaptureError(
        f"model directory {text!r} does not exist; give a directory with config.json, or a hub id org/name"
    )


def _about_file(path: Path) -> str:
    if path.suffix == ".gguf":
        return f"{path} is a GGUF file, which is an output format here; give the model's safetensors directory"
    if path.suffix in _PICKLES:
        return f"{path} is a pickle, which can run code when it is opened and so never is; {_CONVERT}"
    if path.suffix == ".safetensors":
        return f"{path} holds weights but no architecture; give the directory that has it beside config.json"
    return f"{path} is a file of an unknown kind; give a model directory or a .pt2 file"


def _snapshot(name: str) -> Path:
    import huggingface_hub

    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:  # the hub's client raises its own, httpx's and OS errors alike
        raise CaptureError(
            f"{name!r} is neither a directory nor can it be fetched from the hub ({type(error).__name__}: "
            f"{one_line(error)}); check the name, the network and the access rights, or give a local directory"
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises CaptureError where the file is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CaptureError(f"{path} is not readable JSON ({one_line(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise CaptureError(f"{path} holds {type(value).__name__}, not an object; fetch the file again")
    return value


def read_shards(directory: Path) -> dict[str, ShardSource]:
    """Every tensor of the directory's safetensors shards, by name, from their headers alone.

    Raises CaptureError for a shard that is missing, truncated or lacks a tensor that the index promises, and where
    there are no safetensors weights at all.
    """
    if (directory / INDEX).is_file():
        return _read_index(directory)
    if (directory / SINGLE).is_file():
        return read_header(directory / SINGLE)
    others = sorted(p.name for p in directory.iterdir() if p.is_file())
    if pickled := [name for name in others if Path(name).suffix in _PICKLES]:
        raise CaptureError(
            f"{directory} has its weights only in {pickled[0]}, a pickle, which can run code when it is opened and so "
            f"never is; {_CONVERT}"
        )
    if stray := [name for name in others if name.endswith((".safetensors", ".gguf"))]:
        raise CaptureError(f"{directory} has {stray[0]} but neither {SINGLE} nor {INDEX}; save it with save_pretrained")
    raise CaptureError(f"{directory} has no weights: neither {SINGLE} nor {INDEX} is there")


def _read_index(directory: Path) -> dict[str, ShardSource]:
    index = read_json(directory / INDEX).get("weight_map")
    if not isinstance(index, dict):
        raise CaptureError(f"{directory / INDEX} has no weight_map; fetch the file again")
    shards: dict[str, Mapping[str, ShardSource]] = {}
    tensors: dict[str, ShardSource] = {}
    for name, file in index.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CaptureError(f"{directory / INDEX} places {name!r} in {file!r}, which is not a file beside it")
        if file not in shards:
            if not (directory / file).is_file():
                raise CaptureError(f"{directory} lacks the shard {file} that its index names; fetch it again")
            shards[file] = read_header(directory / file)
        if name not in shards[file]:
            raise CaptureError(f"{directory / file} lacks the tensor {name!r} that the index promises; fetch it again")
        tensors[name] = shards[file][name]
    return tensors


def read_header(path: Path) -> dict[str, ShardSource]:
    """The tensors that a safetensors file's header declares, each checked to lie within the file; no data is read."""
    size = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        length: int = struct.unpack("<Q", prefix)[0] if len(prefix) == 8 else size
        if 8 + length > size:
            raise CaptureError(f"{path} is truncated or no safetensors file ({size} bytes); fetch it again")
        raw = file.read(length)
    try:
        header = json.loads(raw)
        header.pop("__metadata__", None)
        tensors = {name: _entry(path, name, value, size - 8 - length) for name, value in header.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CaptureError(f"{path} has a corrupt safetensors header ({one_line(error)}); fetch it again") from error
    return tensors


def _entry(path: Path, name: str, value: Mapping[str, Any], available: int) -> ShardSource:
    if value["dtype"] not in DTYPES:
        raise CaptureError(f"{path} has tensor {name!r} of element type {value['dtype']!r}, which is not supported")
    dtype, shape = DTYPES[value["dtype"]], tuple(int(n) for n in value["shape"])
    start, end = value["data_offsets"]
    if end > available:
        raise CaptureError(
            f"{path} is truncated: tensor {name!r} ends at byte {end} of its data, the file has {available}; fetch it "
            "again"
        )
    if start < 0 or end - start != math.prod(shape) * dtype.itemsize:
        raise CaptureError(f"{path} is corrupt: tensor {name!r} {list(shape)} has {end - start} bytes; fetch it again")
    return ShardSource(path, name, shape, dtype)


def tokenizer_path(directory: Path) -> str | None:
    """The directory, where it holds a tokenizer."""
    return str(directory) if any((directory / name).is_file() for name in _TOKENIZER) else None


def one_line(error: BaseException, limit: int = 240) -> str:
    """An error's message as one line of bounded length."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else text[: limit - 1] + "…"
