"""The one loop of all data-driven passes: collect, solve, apply, run on.

Between stages, only the values that are alive there are kept, for each batch; of the weights, one stage's. Where passes
compare the float program with the one that is being quantized, both are run side by side.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from qcompile.calibration.chain import Chain, Stage, cut
from qcompile.calibration.checkpoint import Checkpoint, Values, fingerprint
from qcompile.calibration.estimate import Estimate, estimate
from qcompile.calibration.machine import give_back, keep_freed, peak_memory
from qcompile.calibration.processes import Processes, joined
from qcompile.calibration.settings import Settings
from qcompile.calibration.slices import Slice
from qcompile.calibration.statistics import Collector, Seen, Want
from qcompile.calibration.store import ValueStore
from qcompile.calibration.worker import SegmentPass, Setup, Solved, Worker
from qcompile.data.batches import Batch, feeds, samples_of, token_mask, tokens_in
from qcompile.errors import QCompileError
from qcompile.ir.program import Program
from qcompile.ir.run import fill
from qcompile.pass_base import Report
from qcompile.passes.quantize.plain import without_rounding
from qcompile.progress import track

PORTION = 1024
"""Tokens that are run at once, more where one sample has more."""


def run_segments(
    program: Program,
    passes: Sequence[SegmentPass],
    batches: Iterable[Batch],
    settings: Settings | None = None,
    resume: Path | None = None,
) -> list[Report]:
    """Run passes that stand in a row over `program`, in place; one report each.

    Args:
        batches: token ids ``[batch, length]``, or inputs by name.
        resume: a folder for finished segments. One that holds some of the same run is gone on with; one of another run
            is refused.

    Raises QCompileError for data without tokens, for a run that would not fit in memory, and for a nan or infinity with
    the place and the sample.
    """
    setup = Setup(program, without_rounding(program), settings or Settings())
    data = [part for batch in batches for part in _portions(feeds(batch))]
    if not any(t.numel() for batch in data for t in batch.values()):
        raise QCompileError("the calibration data has no tokens; give data= with at least one batch")
    processes = joined()
    workers = [p.begin(setup) for p in passes]
    engine = Engine(setup, workers, data, processes)
    expected = estimate(engine)
    expected.check(setup.settings.true_sequential, engine.quantized is not None and engine.plain is not None)
    made = None
    if resume is not None:
        about = f"{setup.settings} {processes.size}"
        made = Checkpoint(resume, fingerprint(program, [str(p) for p in passes], about, data))
    engine.run(made, expected)
    reports = [worker.finish() for worker in workers]
    reports[0].notes += engine.notes()
    reports[0].measure("calibration", {**engine.figures(), **expected.figures(), "peak_bytes": peak_memory()})
    return reports


def _portions(batch: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """A batch in parts of whole samples and about `PORTION` tokens: what is computed in between stays small enough for
    an allocator to use the same memory again and again, and products are as fast as of more.
    """
    count = samples_of(batch)
    longest = max((t.shape[1] for t in batch.values() if t.ndim == 2 and not t.is_floating_point()), default=1)
    few = max(1, PORTION // longest)
    for start in range(0, max(1, count), few):
        yield {name: tensor[start : start + few] if tensor.ndim else tensor for name, tensor in batch.items()}


@dataclass
class Stream:
    """One of the two programs, and its values at the boundary that has been reached."""

    program: Program
    values: ValueStore


class Engine:
    """One run; see `run_segments`."""

    def __init__(self, setup: Setup, workers: Sequence[Worker], data: list[dict[str, Tensor]], processes: Processes):
        self.setup, self.workers, self.processes = setup, workers, processes
        self.data = data
        starts = [0]
        for batch in data:
            starts.append(starts[-1] + samples_of(batch))
        self.samples = [range(a, b) for a, b in itertools.pairwise(starts)]
        self.mine = processes.mine(len(data))
        targets = list(dict.fromkeys(t for worker in workers for t in worker.targets()))
        self.chain: Chain = cut(setup.plain, targets, setup.settings.true_sequential)
        device = setup.settings.device
        self.device = None if device is None else torch.device(device)
        budget = int(setup.settings.memory * 1e9)
        quantized = any(w.needs_quantized for w in workers)
        plain = any(w.needs_float for w in workers)
        share = budget // max(1, quantized + plain)
        self.quantized = Stream(setup.program, ValueStore(share)) if quantized else None
        self.plain = Stream(setup.plain, ValueStore(share)) if plain else None
        self.seconds = {"forward": 0.0, "collect": 0.0, "solve": 0.0}

    def run(self, checkpoint: Checkpoint | None = None, expected: Estimate | None = None) -> None:
        """All stages; what a checkpoint has is applied as it was found. `expected` weighs them for the progress."""
        stages = self.chain.stages
        keep_freed()
        done = 0 if checkpoint is None else self._restore(checkpoint)
        kept: list[list[Solved]] = []
        weights, quiet = None if expected is None else expected.stages, not self.processes.writes
        for index, stage in enumerate(track(stages, "calibrating", len(stages), quiet, weights)):
            if index < done:
                continue
            if checkpoint is None:
                self._settle(stage)  # what was found is in the program, and let go
            else:
                kept.append(self._settle(stage))
            give_back()
            last = index + 1 == len(stages)
            if not last:
                self._advance(stage)
            if checkpoint is not None and (last or stages[index + 1].segment != stage.segment):
                checkpoint.commit(index + 1, kept, () if last else self._boundary(), self.processes)
                kept = []

    def notes(self) -> list[str]:
        """Lines for the report: how the program was cut, and what was run."""
        if not self.chain.stages:
            return []
        tokens = sum(tokens_in(batch) for batch in self.data)
        lines = [f"{self.chain.describe()}; {self.samples[-1].stop} samples, {tokens} tokens"]
        spilled = sum(stream.values.spilled for stream in self._streams().values())
        if spilled:
            lines.append(f"{spilled / 1e9:.2f} GB of values between stages went through files")
        return lines

    def figures(self) -> dict[str, float]:
        """How much there was, and the seconds it took."""
        counts = {"segments": self.chain.segments, "stages": len(self.chain.stages), "processes": self.processes.size}
        return {**counts, **{f"{what}_seconds": seconds for what, seconds in self.seconds.items()}}

    def _settle(self, stage: Stage) -> list[Solved]:
        solved = []
        for phase in sorted({worker.phase for worker in self.workers}):
            members = [w for w in self.workers if w.phase == phase]
            wants = list(dict.fromkeys(want for worker in members for want in worker.wants(stage)))
            found = self._collect(stage, wants)
            start = time.perf_counter()
            for worker in members:
                solved.append(worker.solve(stage, found, self.processes))
                worker.apply(stage, solved[-1])
            self.seconds["solve"] += time.perf_counter() - start
        return solved

    def _collect(self, stage: Stage, wants: Sequence[Want]) -> dict[Want, Collector]:
        """Run from where the stage starts to what is wanted, batch by batch."""
        start = time.perf_counter()
        found, shared = {want: want.make() for want in wants}, dict[int, Tensor]()
        names = {"quantized": (n for w in wants for n in w.quantized), "float": (n for w in wants for n in w.float)}
        streams = {"quantized": self.quantized, "float": self.plain}
        parts = {name: self._part(streams[name], stage, dict.fromkeys(n), shared) for name, n in names.items()}
        for batch in self.mine if wants else ():
            values = {name: self._run(*part, batch) if part else {} for name, part in parts.items()}
            mask = token_mask(self.data[batch])
            seen = Seen(self.samples[batch], values["quantized"], values["float"], mask)
            for collector in found.values():
                collector.see(seen)
        for collector in found.values():
            collector.add_up(self.processes)
        self.seconds["collect"] += time.perf_counter() - start
        return found

    def _part(
        self, stream: Stream | None, stage: Stage, names: Iterable[str], shared: dict[int, Tensor]
    ) -> tuple[Stream, Slice] | None:
        listed = list(names)
        if not listed:
            return None
        if stream is None:
            raise RuntimeError(f"a pass wants {listed[0]} of a program that it did not ask to be run")
        waiting = self._waiting() if stream is self.quantized else {}
        return stream, self.slice(stream, stage.starts, listed, shared, waiting)

    def _run(self, stream: Stream, part: Slice, batch: int) -> dict[str, Any]:
        values = stream.values.get(batch) if part.inputs else {}
        return part.run(values, fill(stream.program, self.data[batch]))

    def slice(
        self,
        stream: Stream,
        starts: Iterable[str],
        ends: Iterable[str],
        shared: dict[int, Tensor] | None = None,
        waiting: Mapping[str, str] | None = None,
    ) -> Slice:
        """Part of one of the programs, to be run as the settings say."""
        halved = self.setup.settings.compute == "bfloat16"
        return Slice(stream.program, starts, ends, self.device, shared, waiting, halved)

    def _advance(self, stage: Stage) -> None:
        start = time.perf_counter()
        for stream in self._streams().values():
            part = self.slice(stream, stage.starts, stage.ends)
            for batch in self.mine:
                stream.values.put(batch, self._run(stream, part, batch))
        self.seconds["forward"] += time.perf_counter() - start

    def _waiting(self) -> dict[str, str]:
        return {node: weight for worker in self.workers for node, weight in worker.waiting().items()}

    def _streams(self) -> dict[str, Stream]:
        named = {"quantized": self.quantized, "float": self.plain}
        return {name: stream for name, stream in named.items() if stream is not None}

    def _boundary(self) -> Iterator[tuple[int, Values]]:
        for batch in self.mine:
            yield batch, {name: stream.values.get(batch) for name, stream in self._streams().items()}

    def _restore(self, checkpoint: Checkpoint) -> int:
        """Apply what is finished; returns how many stages that is."""
        done = 0
        for solved in checkpoint.finished():
            for members in solved:
                for worker, part in zip(self._in_order(), members, strict=True):
                    worker.apply(self.chain.stages[done], part)
                done += 1
        if done == len(self.chain.stages):
            checkpoint.tidy(set(), self.processes)  # it may have been killed before it did
        elif done:
            for batch, values in checkpoint.boundary(self.mine):
                for name, stream in self._streams().items():
                    stream.values.put(batch, values.get(name, {}))
        return done

    def _in_order(self) -> list[Worker]:
        return sorted(self.workers, key=lambda worker: worker.phase)
