"""Rotate a Llama of the 8B shape from disk to disk, beside a plain copy of the same bytes.

    python benchmarks/rotate_8b.py                        # 32 layers: 16 GB read, 16 GB written
    python benchmarks/rotate_8b.py --layers 8 --folder /scratch

The checkpoint is bfloat16 with random values, in safetensors of 5 GB. Every step runs in a process of its own; before
each, the checkpoint leaves the page cache, and what it writes is on disk when its clock stops.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from common import Run, measure, publish
from llama_shapes import SHARD, Shape, write

PIPELINE = "raise-norms, fold-norm-affine, center-norm, rotate(qk=true, orphans=true)"
BUFFER = 32 << 20  # bytes that the copy reads at a time


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--repeat", type=int, default=2, help="rotations; there is a copy before each and after the last"
    )
    parser.add_argument(
        "--folder", type=Path, help="where there is room for two checkpoints; a temporary one by default"
    )
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    parser.add_argument("--step", nargs=3, metavar=("STEP", "FROM", "TO"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.step:
        step, source, target = arguments.step
        print(json.dumps({"copy": copy, "rotate": rotate}[step](Path(source), Path(target))))
        return
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        source, target = Path(folder) / "original", Path(folder) / "result"
        source.mkdir()
        room = shutil.disk_usage(folder).free
        need = 2 * sum(2 * _count(dims) for _, dims in Shape(arguments.layers).tensors())
        if room < 1.1 * need:
            sys.exit(f"{folder} has {room / 1e9:.0f} GB free; {arguments.layers} layers need {1.1 * need / 1e9:.0f} GB")
        start = time.perf_counter()
        size = write(source, Shape(arguments.layers), filled=True)
        print(f"{size / 1e9:.1f} GB written in {time.perf_counter() - start:.0f} s", flush=True)
        runs: list[tuple[str, Run]] = []
        for name in [*["copy", "rotate"] * arguments.repeat, "copy"]:
            runs.append((name, _step(name, source, target, arguments.threads)))
            print(*runs[-1], flush=True)
            shutil.rmtree(target)
    show(runs, size, arguments.layers, arguments.threads)


def _count(dims: Sequence[int]) -> int:
    return dims[0] * (dims[1] if len(dims) > 1 else 1)


def _step(name: str, source: Path, target: Path, threads: int) -> Run:
    target.mkdir()
    for path in source.glob("*.safetensors"):
        _settle(path)
    command = [sys.executable, __file__, "--step", name, str(source), str(target)]
    return measure(command, {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads)})


def _settle(path: Path) -> None:
    """On disk, and out of the page cache."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def copy(source: Path, target: Path) -> dict[str, float]:
    """Read every byte and write it."""
    start = time.perf_counter()
    buffer = bytearray(BUFFER)
    view = memoryview(buffer)
    for path in sorted(source.glob("*.safetensors")):
        with path.open("rb", buffering=0) as reader, (target / path.name).open("wb", buffering=0) as writer:
            while count := reader.readinto(buffer):
                writer.write(view[:count])
            os.fsync(writer.fileno())
    return {"stream": time.perf_counter() - start, "load": os.getloadavg()[0]}


def rotate(source: Path, target: Path) -> dict[str, float]:
    """Capture, run the passes, write every weight with its edits."""
    start = time.perf_counter()
    import qcompile
    from qcompile.capture.shards import write_store

    seconds = {"import": time.perf_counter() - start}
    start = time.perf_counter()
    program = qcompile.capture(source, dtype="auto")
    seconds["capture"] = time.perf_counter() - start
    start = time.perf_counter()
    reports = qcompile.run_passes(program, PIPELINE)
    seconds["passes"] = time.perf_counter() - start
    start = time.perf_counter()
    write_store(program.weights, list(program.weights), target, SHARD)
    for path in target.glob("*.safetensors"):
        _settle(path)
    seconds["stream"] = time.perf_counter() - start
    return {**seconds, "load": os.getloadavg()[0], **reports[-1].measured["rotations"]}


def _parts(run: Run) -> dict[str, float]:
    """What a step said of itself."""
    found: dict[str, float] = json.loads(run.output.splitlines()[-1])
    return found


def _times(seconds: list[float], of: float) -> str:
    """How many times a number of seconds, from the least to the most."""
    return " to ".join(dict.fromkeys(f"{x / of:.1f}" for x in (min(seconds), max(seconds)))) + " times"


def show(runs: list[tuple[str, Run]], size: int, layers: int, threads: int) -> None:
    """Print the table, and with ``--write`` put it into results/."""
    copies = [_parts(run)["stream"] for name, run in runs if name == "copy"]
    copied = sum(copies) / len(copies)
    rows: list[dict[str, object]] = []
    counts, times = "", []
    for name, run in runs:
        parts = _parts(run)
        taken = run.wall if name == "rotate" else parts["stream"]
        times += [taken] * (name == "rotate")
        rows.append(
            {
                "step": name,
                "wall, s": f"{run.wall:.0f}",
                "import, capture, passes, s": ", ".join(
                    f"{parts[k]:.0f}" for k in ("import", "capture", "passes") if k in parts
                ),
                "stream, s": f"{parts['stream']:.0f}",
                "MB/s": f"{size / 1e6 / parts['stream']:.0f}",
                "CPU, s": f"{run.cpu:.0f}",
                "times the mean copy": f"{taken / copied:.1f}",
                "peak resident, GB": f"{run.peak / 1e9:.2f}",
                "load": f"{parts['load']:.1f}",
            }
        )
        counts = counts or ", ".join(f"{int(parts[k])} {k}" for k in ("R1", "R2", "R3", "R4") if k in parts)
    notes = (
        f"{layers} layers of the 8B shape, {size / 1e9:.1f} GB in bfloat16, {threads} threads. Rotated by "
        f"`{PIPELINE}`: {counts}. Stream: every weight is read, edited and written. Load: processes that wanted a core "
        "in the last minute, these included. Copies and rotations take turns. Of the mean copy a rotation takes "
        f"{_times(times, copied)}, of the fastest copy {_times(times, min(copies))}, imports and capture included. "
        "Target: the whole at most 4 times the copy, and under 3 GB."
    )
    publish("rotate_8b", "Rotation from disk to disk", rows, notes)


if __name__ == "__main__":
    main()
