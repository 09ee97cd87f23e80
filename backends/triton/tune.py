"""`qcompile tune`: each configuration that a bundle has binaries for, measured on the GPU at hand.

For every site (an operator, a weight's shape, a bucket of rows) the operator runs on random tensors of the graph's own
shapes, one configuration after the other; the fastest goes into `choices.json`, and its hash into the manifest.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.backends.triton.bundle import CHOICES, Bundle, Choices, read_json
from qcompile.backends.triton.enumerate_launches import meta_arguments
from qcompile.backends.triton.launch import BUCKETS, Config, Launch, dispatching
from qcompile.backends.triton.launcher import BundleDispatcher
from qcompile.backends.triton.ops.registration import PLANS
from qcompile.backends.triton.runtime import TritonRunner
from qcompile.errors import QCompileError
from qcompile.manifest import MANIFEST, FileEntry, Manifest, file_hash
from qcompile.progress import track

REPEATS = 20
Timer = Callable[[Callable[[], None]], float]
"""Microseconds that a function takes on the device."""


@dataclass
class _Trying:
    """A dispatcher that takes the configuration at `index` of those that a bundle has, and launches through it."""

    bundle: BundleDispatcher
    index: int = 0
    site: str = ""
    candidates: Sequence[Config] = ()

    def choose(self, site: str, candidates: Sequence[Config]) -> Config:
        compiled = self.bundle.bundle.sites.get(site, {}).get(self.bundle.gpu or "", ())
        self.site, self.candidates = site, [c for c in candidates if c.label in compiled] or candidates[:1]
        return self.candidates[min(self.index, len(self.candidates) - 1)]

    def launch(self, launches: Sequence[Launch]) -> None:
        self.bundle.launch(launches)


def tune(directory: Path) -> list[str]:
    """Measure, write `choices.json` and the manifest; returns a line for every site.

    Raises QCompileError without a GPU, and where the bundle has no binaries for it: then there is nothing to choose.
    """
    if not torch.cuda.is_available():
        raise QCompileError("tuning measures kernels on a GPU and torch finds none; run it on the machine with the GPU")
    runner = TritonRunner(directory, "binary")
    assert runner.dispatcher is not None
    found = measure(runner, runner.dispatcher, event_timer)
    return write_choices(directory, runner.bundle, str(runner.dispatcher.gpu), found)


def measure(runner: TritonRunner, bundle: BundleDispatcher, timer: Timer) -> dict[str, list[tuple[str, float]]]:
    """Site → (label, microseconds) of each of its configurations."""
    program, found, done = runner.program, dict[str, list[tuple[str, float]]](), set()
    nodes = [node for node in program.nodes if node.target in PLANS]
    for node in track(nodes, "measuring"):
        for rows in BUCKETS:
            described = meta_arguments(program, node, rows)
            if (key := (node.target, repr(described))) in done:
                continue
            done.add(key)
            arguments = _random(described, runner.device)
            trying = _Trying(bundle)
            while True:
                with dispatching(trying):
                    target: Any = node.target
                    took = timer(lambda target=target, arguments=arguments: target(*arguments))  # type: ignore[misc]
                if not trying.candidates:
                    break  # one configuration only
                label = trying.candidates[trying.index].label
                found.setdefault(trying.site, []).append((label, took))
                trying.index += 1
                if trying.index >= len(trying.candidates):
                    break
    return found


def write_choices(directory: Path, bundle: Bundle, gpu: str, found: dict[str, list[tuple[str, float]]]) -> list[str]:
    """Write the fastest of each site beside those of other GPUs, and the file's hash into the manifest."""
    path = directory / CHOICES
    known = read_json(path, Choices).gpus if path.is_file() else {}
    best = {site: min(tried, key=lambda pair: pair[1]) for site, tried in found.items()}
    _replace(path, json.dumps(Choices(gpus={**known, gpu: best}).model_dump(mode="json"), indent=1) + "\n")
    manifest = Manifest.read(directory)
    entry = FileEntry(bytes=path.stat().st_size, sha256=file_hash(path))
    updated = manifest.model_copy(update={"files": {**manifest.files, CHOICES: entry}})
    _replace(directory / MANIFEST, json.dumps(updated.model_dump(mode="json"), indent=1) + "\n")
    return [f"{site}: {label}, {took:.1f} µs of {len(found[site])} tried" for site, (label, took) in best.items()]


def event_timer(function: Callable[[], None]) -> float:
    """Microseconds of one call, by CUDA events over many, the first of which load kernels and warm caches."""
    for _ in range(3):
        function()
    make: Any = torch.cuda.Event
    start, end = make(enable_timing=True), make(enable_timing=True)
    start.record()
    for _ in range(REPEATS):
        function()
    end.record()
    torch.cuda.synchronize()
    return float(start.elapsed_time(end)) * 1000 / REPEATS


def _random(arguments: Sequence[Any], device: torch.device) -> list[Any]:
    """Arguments of an operator with random contents; integers are small and not negative, as experts' numbers are."""

    def made(value: Any) -> Any:
        if isinstance(value, list):
            return [made(item) for item in value]
        if not isinstance(value, Tensor):
            return value
        if value.dtype.is_floating_point:
            return torch.rand(value.shape, device=device).to(value.dtype)
        high = 2 if value.dtype in (torch.bool, torch.int64) else 120
        return torch.randint(0, high, value.shape, device=device).to(value.dtype)

    return [made(argument) for argument in arguments]


def _replace(path: Path, text: str) -> None:
    """Write a file beside and rename it into place, so that there is never half of one."""
    beside = path.with_name(f".{path.name}.partial-{os.getpid()}")
    beside.write_text(text)
    beside.rename(path)
