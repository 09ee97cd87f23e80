"""Checkpoints of Llama 3 shapes on disk: sparse ones, which cost no disk, or with random values, written bit by bit."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from torch import Tensor

SHARD = 5_000_000_000  # bytes of a file


@dataclass(frozen=True)
class Shape:
    """A Llama in bfloat16; the widths default to those of the 8B model."""

    layers: int = 32
    width: int = 4096
    hidden: int = 14336
    heads: int = 32
    kv_heads: int = 8
    vocabulary: int = 128256

    def config(self) -> dict[str, object]:
        """What config.json has."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.width,
            "intermediate_size": self.hidden,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "num_hidden_layers": self.layers,
            "vocab_size": self.vocabulary,
            "rope_theta": 500000.0,
            "tie_word_embeddings": False,
            "dtype": "bfloat16",
        }

    def tensors(self) -> Iterator[tuple[str, list[int]]]:
        """Name and shape of every tensor."""
        narrow = self.width // self.heads * self.kv_heads
        yield "model.embed_tokens.weight", [self.vocabulary, self.width]
        for layer in range(self.layers):
            at = f"model.layers.{layer}."
            for name, rows, columns in (
                ("self_attn.q_proj", self.width, self.width),
                ("self_attn.k_proj", narrow, self.width),
                ("self_attn.v_proj", narrow, self.width),
                ("self_attn.o_proj", self.width, self.width),
                ("mlp.gate_proj", self.hidden, self.width),
                ("mlp.up_proj", self.hidden, self.width),
                ("mlp.down_proj", self.width, self.hidden),
            ):
                yield f"{at}{name}.weight", [rows, columns]
            yield f"{at}input_layernorm.weight", [self.width]
            yield f"{at}post_attention_layernorm.weight", [self.width]
        yield "model.norm.weight", [self.width]
        yield "lm_head.weight", [self.vocabulary, self.width]


def write(directory: Path, shape: Shape, filled: bool) -> int:
    """Write a checkpoint; returns the bytes of its tensors. Not `filled`: files of full size without data."""
    (directory / "config.json").write_text(json.dumps(shape.config()))
    shards: list[dict[str, list[int]]] = [{}]
    total = size = 0
    for name, dims in shape.tensors():
        count = 2 * math.prod(dims)
        if size + count > SHARD and shards[-1]:
            shards.append({})
            size = 0
        shards[-1][name] = dims
        size, total = size + count, total + count
    index: dict[str, str] = {}
    values = _values()
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_shard(directory / file, shard, values if filled else None)
        index |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def _write_shard(path: Path, shapes: dict[str, list[int]], values: Callable[[str, int], Tensor] | None) -> None:
    header, offset = {}, 0
    for name, dims in shapes.items():
        size = 2 * math.prod(dims)
        header[name] = {"dtype": "BF16", "shape": dims, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if values is None:
            file.truncate(8 + len(text) + offset)
            return
        for name, dims in shapes.items():
            _fill(file, name, math.prod(dims), values)


def _fill(file: BinaryIO, name: str, count: int, values: Callable[[str, int], Tensor]) -> None:
    while count:
        part = values(name, count)
        part.view(torch.uint8).numpy().tofile(file)
        count -= part.numel()


def _values() -> Callable[[str, int], Tensor]:
    """Values for a tensor, at most so many: a block of normal ones, each time from another place; gains around 1."""
    generator = torch.Generator().manual_seed(0)
    block = (torch.randn(1 << 24, generator=generator) * 0.02).to(torch.bfloat16)
    starts = torch.Generator().manual_seed(1)

    def part(name: str, count: int) -> Tensor:
        start = int(torch.randint(1 << 20, (1,), generator=starts))
        taken = block[start : start + min(count, 1 << 23)]
        return (1 + 10 * taken.float()).to(torch.bfloat16) if "norm" in name else taken

    return part
