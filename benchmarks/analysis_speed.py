"""Time of the channel-space analysis on Llama shapes of 8 to 128 layers (width 4096, 32 heads, 8 of keys and values).

    python benchmarks/analysis_speed.py                     # 8 16 32 64 128 layers
    python benchmarks/analysis_speed.py 32 --profile 25     # where the time goes

The checkpoints are sparse: the analysis reads no weights. Each figure is the smallest of `--repeat` runs, CPU seconds
of one thread; each run starts from the program alone.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from common import publish
from llama_shapes import Shape, write

import qcompile
from qcompile import Program
from qcompile.spaces import ChannelSpaces, Level, channel_spaces

T = TypeVar("T")
ORDER = (Level.ORTHOGONAL, Level.PERMUTATION, Level.DIAGONAL, Level.LINEAR)  # what all levels share falls to the first


@dataclass(frozen=True)
class Timed:
    """CPU seconds for one number of layers."""

    layers: int
    nodes: int
    wires: int
    capture: float
    survey: float
    walk: float
    spaces: dict[Level, float]
    found: dict[Level, int]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("layers", nargs="*", type=int, default=[8, 16, 32, 64, 128])
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--profile", type=int, default=0, metavar="N", help="print the N costliest functions instead")
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    arguments = parser.parse_args()
    measured = []
    for layers in arguments.layers:
        with tempfile.TemporaryDirectory() as folder:
            write(Path(folder), Shape(layers), filled=False)
            program, seconds = timed(lambda at=Path(folder): qcompile.capture(at, dtype="auto"))  # type: ignore[misc]
            if arguments.profile:
                profile(program, arguments.profile)
            else:
                measured.append(one(program, layers, seconds, arguments.repeat))
                print(measured[-1], flush=True)
    if measured:
        show(measured)


def one(program: Program, layers: int, capture: float, repeat: int) -> Timed:
    """Time the analysis and the spaces of every level."""
    from qcompile.ir.contractions import survey

    surveys, walks, levels = [], [], []
    for _ in range(repeat):
        surveys.append(timed(lambda: survey(program))[1])
        spaces, seconds = timed(lambda: channel_spaces(program))
        walks.append(seconds)
        levels.append({level: timed(lambda s=spaces, at=level: s[at])[1] for level in ORDER})  # type: ignore[misc]
    smallest = {level: min(run[level] for run in levels) for level in Level}
    found = {level: len(spaces[level]) for level in Level}
    nodes = len(program.graph.nodes)
    return Timed(layers, nodes, spaces.wires.count, capture, min(surveys), min(walks), smallest, found)


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """The result and the CPU seconds of this process."""
    start = time.process_time()
    result = call()
    return result, time.process_time() - start


def profile(program: Program, count: int) -> None:
    """Print the functions that take longest, of the walk and of reading all spaces, with and without what they call."""

    def everything() -> ChannelSpaces:
        spaces = channel_spaces(program)
        for level in Level:
            spaces[level]
        return spaces

    measured = cProfile.Profile()
    measured.runcall(everything)
    for order in ("tottime", "cumulative"):
        pstats.Stats(measured).sort_stats(order).print_stats(count)


def show(measured: list[Timed]) -> None:
    """Print the table, and with ``--write`` put it into results/."""
    rows: list[dict[str, object]] = []
    for t in measured:
        total = t.walk + t.spaces[Level.ORTHOGONAL]
        row: dict[str, object] = {
            "layers": t.layers,
            "nodes": t.nodes,
            "wires": t.wires,
            "capture, s": f"{t.capture:.1f}",
            "products found, s": f"{t.survey:.2f}",
            "`channel_spaces`, s": f"{t.walk:.2f}",
            "per layer, ms": f"{1e3 * t.walk / t.layers:.1f}",
        }
        row |= {f"{level.name.lower()}, s (spaces)": f"{t.spaces[level]:.2f} ({t.found[level]})" for level in Level}
        rows.append({**row, "walk and orthogonal, s": f"{total:.2f}"})
    notes = (
        "CPU seconds of one thread, the smallest of the runs. `channel_spaces` is the walk, finding the products "
        "included; the columns of levels are reading the spaces of each, after the walk; orthogonal ones are read "
        "first, and what all levels share is counted there. Target: the walk plus the orthogonal spaces at most 1 s "
        f"for 32 layers, linear in layers.{_linearity(measured)}"
    )
    publish("analysis_speed", "Channel spaces of Llama shapes", rows, notes)


def _linearity(measured: list[Timed]) -> str:
    if len(measured) < 3:
        return ""
    layers = np.log([t.layers for t in measured])
    power = {
        "walk": np.polyfit(layers, np.log([t.walk for t in measured]), 1)[0],
        "orthogonal spaces": np.polyfit(layers, np.log([t.spaces[Level.ORTHOGONAL] for t in measured]), 1)[0],
    }
    return " Time grows with layers to the power " + ", ".join(f"{p:.2f} ({name})" for name, p in power.items()) + "."


if __name__ == "__main__":
    main()
