"""Peak memory of a GPTQ run over more and more layers of one shape: that of one segment, whatever the depth.

    python benchmarks/calibration_memory.py --write                      # a Llama of the 1B shape, 8, 16 and 32 layers
    python benchmarks/calibration_memory.py --layers 8 16 --width 1024 --hidden 4096 --vocabulary 32000
    python benchmarks/calibration_memory.py --kept runs.json --write     # a run that is in the file is not made again

Checkpoints are bfloat16 with random values and are taken away again; each is compiled in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import Run, measure, publish
from llama_shapes import Shape, write

RECIPE = "gptq-int4"
SCALES = "weights=int4 sym group=128"
"""Scales are not searched for, which takes most of the time and no memory to speak of."""
ROOM = 1e9
"""Bytes that a run may take beside a segment, its Hessians and the values between stages."""


def main() -> None:
    arguments = _arguments()
    if arguments.step:
        print(json.dumps(step(arguments.step, arguments.samples, arguments.length)))
        return
    kept: dict[str, Any] = {}
    if arguments.kept and arguments.kept.exists():
        kept = json.loads(arguments.kept.read_text())
    found = {}
    for layers in arguments.layers:
        shape = Shape(
            layers, arguments.width, arguments.hidden, arguments.heads, arguments.kv_heads, arguments.vocabulary
        )
        name = f"{shape}, {arguments.samples} × {arguments.length} tokens, {arguments.threads} threads"
        if name not in kept:
            run = _measured(shape, arguments)
            kept[name] = {"peak": run.peak, "cpu": run.cpu, "wall": run.wall, **json.loads(run.output.splitlines()[-1])}
            if arguments.kept:
                arguments.kept.write_text(json.dumps(kept, indent=1))
        found[shape] = kept[name]
        print(layers, found[shape], flush=True)
    show(found, arguments)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, nargs="+", default=[8, 16, 32])
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--hidden", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--vocabulary", type=int, default=128256)
    parser.add_argument("--samples", type=int, default=8)
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--folder", type=Path, help="where there is room for a checkpoint; a temporary one by default")
    parser.add_argument("--kept", type=Path, help="a JSON file of runs that are made, and found again")
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    parser.add_argument("--step", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _measured(shape: Shape, arguments: argparse.Namespace) -> Run:
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        room, need = shutil.disk_usage(folder).free, sum(2 * torch.Size(dims).numel() for _, dims in shape.tensors())
        if room < 2 * need:
            sys.exit(f"{folder} has {room / 1e9:.0f} GB free; {shape.layers} layers need {2 * need / 1e9:.0f} GB")
        write(Path(folder), shape, filled=True)
        command = [sys.executable, __file__, "--step", folder]
        command += ["--samples", str(arguments.samples), "--length", str(arguments.length)]
        threads = str(arguments.threads)
        return measure(command, {"OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads})


class Peaks:
    """An instrument: the highest resident bytes so far, after each pass."""

    def __init__(self) -> None:
        self.after_pass = {"import": _peak()}

    def before(self, index: int, pass_: Any, program: Any) -> None:
        self.after_pass.setdefault("capture", _peak())

    def after(self, index: int, pass_: Any, program: Any, report: Any) -> None:
        self.after_pass[str(pass_.name)] = _peak()


def step(folder: Path, samples: int, length: int) -> dict[str, Any]:
    """Compile a checkpoint; peaks after each pass, and what the engine measured and estimated."""
    import qcompile

    peaks = Peaks()
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    tokens = torch.randint(0, vocabulary, (samples, length), generator=torch.Generator().manual_seed(0))
    overrides = [f"calibration.samples={samples}", f"calibration.length={length}", SCALES]
    compiled = qcompile.compile(folder, RECIPE, tokens, overrides=overrides, instruments=[peaks])
    report = compiled.report.passes[-1]
    return {"peaks": peaks.after_pass, "calibration": report.measured["calibration"]}


def show(found: dict[Shape, dict[str, Any]], arguments: argparse.Namespace) -> None:
    """Print the table, and with ``--write`` put it into results/."""
    rows: list[dict[str, object]] = []
    for shape, run in found.items():
        limit = sum(_parts(shape, arguments.samples * arguments.length)) + ROOM
        rows.append(
            {
                "layers": shape.layers,
                "peak resident, GB": f"{run['peak'] / 1e9:.2f}",
                "before rounding, GB": f"{list(run['peaks'].values())[-2] / 1e9:.2f}",
                "limit, GB": f"{limit / 1e9:.2f}",
                "estimated peak, GB": f"{run['calibration'].get('estimated_peak_bytes', 0) / 1e9:.2f}",
                "estimated, s": f"{run['calibration'].get('estimated_seconds', 0):.0f}",
                "collect, solve, run on, s": ", ".join(
                    f"{run['calibration'][f'{part}_seconds']:.0f}" for part in ("collect", "solve", "forward")
                ),
                "wall, s": f"{run['wall']:.0f}",
                "CPU, s": f"{run['cpu']:.0f}",
            }
        )
    shape = next(iter(found))
    segment, hessians, values = (part / 1e9 for part in _parts(shape, arguments.samples * arguments.length))
    peaks = [run["peak"] for run in found.values()]
    notes = (
        f"Hidden {shape.width}, FFN {shape.hidden}, {shape.heads} heads, {shape.kv_heads} of keys and values, "
        f"vocabulary {shape.vocabulary}; `{RECIPE}` with `{SCALES}`, {arguments.samples} × {arguments.length} tokens, "
        f"{arguments.threads} threads. Limit: the segment with the embedding in front of it in float32 "
        f"({segment:.2f} GB), its Hessians with cross terms in float64 ({hessians:.2f} GB), the values kept between "
        f"stages ({values:.2f} GB), and 1 GB. Peaks differ by {max(peaks) / min(peaks) - 1:.1%}; target: at most 5%."
    )
    publish("calibration_memory", "Peak memory of a GPTQ run by depth", rows, notes)


def _parts(shape: Shape, tokens: int) -> tuple[int, int, int]:
    """Bytes of the weights of the largest segment, of its Hessians, and of the values kept."""
    narrow = shape.width // shape.heads * shape.kv_heads
    layer = shape.width * (2 * shape.width + 2 * narrow + 3 * shape.hidden)
    hessians = 2 * 8 * (3 * shape.width**2 + shape.hidden**2)
    return 4 * (layer + shape.vocabulary * shape.width), hessians, 2 * 4 * tokens * (shape.width + shape.hidden)


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


if __name__ == "__main__":
    main()
