"""Fused rotation of tiny random models beside Brevitas: seconds and drift.

    python benchmarks/brevitas.py --write

Brevitas runs in an environment of its own (see README.md), once as it comes, once with one eps for all norms, and once
without the values of attention. Both sides get the same models, in float64, with gains and biases away from 1 and 0.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import torch
from common import publish

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # where the families live
from families.captured import SHAPES, capture_family, error, inputs_of, logits

import qcompile

FAMILIES = ("llama", "qwen2", "qwen3", "phi3", "gemma", "opt", "gpt2", "mixtral")
PIPELINE = "raise-norms, fold-norm-affine, center-norm, rotate"
VARIANTS = {"as it comes": (), "one eps": ("--same-eps",), "one eps, no values": ("--same-eps", "--no-heads")}


def ours(name: str) -> dict[str, object]:
    """Seconds of capture, of the passes, and how far they moved the logits; the second run of each."""
    for _ in range(2):
        start = time.perf_counter()
        program = capture_family(name).program
        captured = time.perf_counter()
        feeds = inputs_of(name, *SHAPES[0])
        before, begin = logits(program, feeds), time.perf_counter()
        *_, report = qcompile.run_passes(program, PIPELINE)
        passes = time.perf_counter() - begin
    rotations = report.measured["rotations"]
    return {
        "qcompile: R1, R2": f"{rotations['R1']:.0f}, {rotations['R2']:.0f}",
        "qcompile: drift": f"{error(logits(program, feeds), before):.0e}",
        "capture, s": f"{captured - start:.2f}",
        "passes, s": f"{passes:.2f}",
    }


def theirs(python: str, options: tuple[str, ...]) -> dict[str, dict[str, object]]:
    """What Brevitas gives for each family."""
    command = [python, str(Path(__file__).parent / "peers" / "brevitas_rotation.py"), *options, *FAMILIES]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    return {row["family"]: row for row in map(json.loads, done.stdout.splitlines())}


def _drift(found: dict[str, object]) -> str:
    if "drift" not in found:
        return "—"
    return f"{found['drift']:.0e}" if found["changed"] else "nothing changed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", default="BREVITAS/bin/python", help="that of the environment that has Brevitas")
    parser.add_argument("--write", action="store_true", help="put the table into results/")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    peer = {variant: theirs(arguments.python, options) for variant, options in VARIANTS.items()}
    rows: list[dict[str, object]] = []
    for name in FAMILIES:
        row: dict[str, object] = {"family": name}
        for variant, found in peer.items():
            row[f"Brevitas {variant}: drift"] = _drift(found[name])
        seconds = peer["as it comes"][name].get("seconds")
        row["s"] = "—" if seconds is None else f"{seconds:.2f}"
        rows.append(row | ours(name))
    failed = {
        f"{name}: {found['error']}" for found_ in peer.values() for name, found in found_.items() if "error" in found
    }
    publish(
        "brevitas",
        "Fused rotation beside Brevitas",
        rows,
        NOTES.format(pipeline=PIPELINE, failed="; ".join(sorted(failed))),
    )


NOTES = """\
max |Δlogit| / max |logit| on the tiny random float64 models of tests/families, gains and biases away from 1 and 0; one
thread each. Brevitas 0.13.4: its language-model entry point for a fused Hadamard rotation (`fused_no_fx`) of stream and
values; *s* is of that call, which finds regions by tracing the model. qcompile: `{pipeline}`;
capture traces the model, the passes follow. Each is timed when a run before has loaded what it needs.

Failures of Brevitas here: {failed}.
A model that does not run in float64 in its environment is no finding about it, and where logits differ by 100% it may
be how the entry point is called here, without the rest of its program."""


if __name__ == "__main__":
    main()
