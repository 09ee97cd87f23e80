"""Time and memory of capturing a Llama shape from a checkpoint, and of reading its weights one by one.

    python benchmarks/capture.py                      # 7B shape: 32 layers, width 4096
    python benchmarks/capture.py --layers 4 --json    # smaller, plain data

The checkpoint is sparse: its shards have their full size and no data, so they cost no disk. Memory is this process'
resident set (Linux), measured from its start, so that it includes Python, torch and transformers.
"""

from __future__ import annotations

import argparse
import json
import struct
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

WIDTHS = {4096: (11008, 32), 2048: (5632, 16), 1024: (2816, 8), 256: (704, 4)}
VOCABULARY = 32000


@dataclass(frozen=True)
class Measured:
    """Seconds on the clock and of the processor, and resident megabytes (10⁶ bytes) then; `peak` is the highest yet."""

    what: str
    seconds: float
    cpu_seconds: float
    resident_mb: float
    peak_mb: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--width", type=int, default=4096, choices=WIDTHS)
    parser.add_argument("--json", action="store_true", help="print plain data")
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        size = write_checkpoint(Path(folder), arguments.layers, arguments.width)
        rows, largest = measure(Path(folder))
    if arguments.json:
        print(json.dumps({"checkpoint_mb": size / 1e6, "largest_mb": largest / 1e6, "rows": [asdict(r) for r in rows]}))
    else:
        show(rows, size, largest, arguments.layers, arguments.width)


def measure(directory: Path) -> tuple[list[Measured], int]:
    """Measure each step; also the size in bytes of the largest weight."""
    start = _clocks()
    import transformers  # noqa: F401

    from qcompile import capture

    rows = [_row("import torch, transformers", start)]
    start = _clocks()
    program = capture(directory, dtype="auto")
    rows.append(_row(f"capture ({len(program.nodes)} calls)", start))
    start = _clocks()
    largest = 0
    for key in program.weights:
        tensor = program.weights[key]
        tensor.flatten()[:: 4096 // tensor.element_size()].sum()  # touches every page
        largest = max(largest, program.weights.nbytes(key))
    rows.append(_row(f"read {len(program.weights)} weights, one by one", start))
    start = _clocks()
    text = str(program)
    rows.append(_row(f"print ({len(text) / 1e6:.1f} MB of text)", start))
    return rows, largest


def write_checkpoint(directory: Path, layers: int, width: int) -> int:
    """A sparse bfloat16 Llama checkpoint of 2 GB shards; returns its bytes."""
    hidden, heads = WIDTHS[width]
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": hidden,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "num_hidden_layers": layers,
        "vocab_size": VOCABULARY,
        "dtype": "bfloat16",
    }
    (directory / "config.json").write_text(json.dumps(config))
    shapes: dict[str, list[int]] = {"model.embed_tokens.weight": [VOCABULARY, width], "model.norm.weight": [width]}
    shapes["lm_head.weight"] = [VOCABULARY, width]
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": [width, width] for p in "qkvo"}
        shapes |= {f"{at}mlp.{p}_proj.weight": [hidden, width] for p in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = [width, hidden]
        shapes |= {f"{at}{p}_layernorm.weight": [width] for p in ("input", "post_attention")}
    shards: list[dict[str, list[int]]] = [{}]
    total = size = 0
    for name, shape in shapes.items():
        count = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        if size + count > 2e9:
            shards.append({})
            size = 0
        shards[-1][name] = shape
        size, total = size + count, total + count
    index = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _write_sparse(directory / file, shard)
        index |= dict.fromkeys(shard, file)
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return total


def _write_sparse(path: Path, shapes: dict[str, list[int]]) -> None:
    header, offset = {}, 0
    for name, shape in shapes.items():
        size = 2 * shape[0] * (shape[1] if len(shape) > 1 else 1)
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [offset, offset + size]}
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + offset)


def _clocks() -> tuple[float, float]:
    return time.perf_counter(), time.process_time()


def _row(what: str, start: tuple[float, float]) -> Measured:
    clock, cpu = (now - then for now, then in zip(_clocks(), start, strict=True))
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    now, peak = (int(status[name].split()[0]) * 1024 / 1e6 for name in ("VmRSS", "VmHWM"))
    return Measured(what, round(clock, 2), round(cpu, 2), round(now), round(peak))


def show(rows: list[Measured], size: int, largest: int, layers: int, width: int) -> None:
    """Print the rows as a table, and with ``--write`` put it into results/."""
    from common import publish

    shown: list[dict[str, object]] = [
        {
            "step": row.what,
            "seconds": f"{row.seconds:.1f}",
            "CPU seconds": f"{row.cpu_seconds:.1f}",
            "resident MB": f"{row.resident_mb:.0f}",
            "peak MB": f"{row.peak_mb:.0f}",
        }
        for row in rows
    ]
    shape = f"Llama, {layers} layers of width {width}: {size / 1e9:.1f} GB, largest weight {largest / 1e6:.0f} MB."
    publish("capture", "Capture from a checkpoint", shown, f"{shape} Target: about 10 s and under 1 GB.")


if __name__ == "__main__":
    main()
