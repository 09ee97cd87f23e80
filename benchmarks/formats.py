"""Encode and decode speed of every format on a 4096 × 4096 float32 tensor, beside the peers that have it.

Peers run in an environment of their own, named by `--peers PYTHON` (see benchmarks/peers/README.md); without it only
qcompile is timed. Every number is GB/s of float32 input *per second of one core*, the best of some rounds, so that a
second program on the machine disturbs it little; `--wall` takes the clock instead.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from common import publish

PEERS = Path(__file__).parent / "peers"
SAME = {
    "Q4_0": "int4 sym group=32 scale=f16",
    "Q5_0": "int5 sym group=32 scale=f16",
    "Q8_0": "int8 sym group=32 scale=f16",
    "MXFP4": "mxfp4(floor)",
    "nf4 group=64 nested": "nf4 group=64 double=8x256",
}
"""What a peer calls a format that qcompile spells otherwise."""


def speeds(python: str, package: str, rounds: int, threads: int) -> dict[str, Any]:
    """What `run_PACKAGE.py speed` prints; empty, with a line, where it fails."""
    command = [python, str(PEERS / f"run_{package}.py"), "speed", "--rounds", str(rounds), "--threads", str(threads)]
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode != 0:
        print(f"{package}: {done.stderr.strip().splitlines()[-1]}", file=sys.stderr)
        return {}
    found: dict[str, Any] = json.loads(done.stdout[done.stdout.index("{\n") :])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--peers", metavar="PYTHON", help="the interpreter of the peers' environment")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--wall", action="store_true")
    parser.add_argument("--write", action="store_true")
    options = parser.parse_args()
    kind = "gbs" if options.wall else "core_gbs"
    ours = speeds(sys.executable, "qcompile", options.rounds, options.threads)["formats"]
    peers: dict[str, list[tuple[str, dict[str, float]]]] = {}
    names = ("ml_dtypes", "torchao", "compressed_tensors", "quark", "bitsandbytes", "gguf") if options.peers else ()
    versions = []
    for name in names:
        found = speeds(options.peers, name, options.rounds, options.threads)
        versions += [f"{found['package']} {found['version']}"] if found else []
        for form, values in found.get("formats", {}).items():
            peers.setdefault(SAME.get(form, form), []).append((found["package"], values))
    rows: list[dict[str, object]] = []
    for form, values in ours.items():
        row: dict[str, object] = {"format": form}
        for part in ("encode", "decode"):
            mine = values[f"{part}_{kind}"]
            best = max(((v.get(f"{part}_{kind}", 0.0), who) for who, v in peers.get(form, [])), default=(0.0, ""))
            row[part] = f"{mine:.2f}"
            row[f"fastest peer, {part}"] = f"{best[0]:.2f} {best[1]}" if best[0] else "none"
            row[f"{part}: ours / its"] = f"{mine / best[0]:.1f}" if best[0] else ""
        rows.append(row)
    unit = "GB/s of float32 input" + ("" if options.wall else " per second of one core")
    notes = f"{unit}, best of {options.rounds}, {options.threads} threads. Peers: {', '.join(versions) or 'not run'}."
    publish("formats", "Formats: encode and decode", rows, notes)


if __name__ == "__main__":
    main()
