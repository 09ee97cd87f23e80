"""What all passes that round weights from statistics have in common: their options, and the work at one stage.

collect H = Σ x̂ x̂ᵀ (and G = Σ x̂ xᵀ) of what a weight reads  ─▶  choose codes  ─▶  store them; what follows sees them
"""

from __future__ import annotations

import math
import time
from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from qcompile.calibration.chain import Stage, Target
from qcompile.calibration.inputs import InputGram, InputWant
from qcompile.calibration.processes import Job, Processes, Result
from qcompile.calibration.statistics import Collector, Want
from qcompile.calibration.worker import SegmentPass, Setup, Solved, Worker
from qcompile.errors import RecipeError
from qcompile.numerics.qtensor import QTensor, quantize_tensor
from qcompile.pass_base import Report
from qcompile.passes.quantize.sites import free_key, given_outer, naming, store_codes
from qcompile.passes.round.bounds import accumulator_of
from qcompile.passes.round.matrices import Cached, How, round_weight
from qcompile.passes.round.places import Place, find_places
from qcompile.passes.round.queries import made_for_scores
from qcompile.rounding import GPFQ, AwqClip, MagR, Method
from qcompile.rounding.solve import Groups


@dataclass(frozen=True)
class Rounding(SegmentPass):
    """Options of all of them; see `RoundingWorker` for what they do.

    Args:
        safe: a weight whose error would be larger than that of rounding to nearest is rounded to nearest.
        magr: α of MagR (arXiv 2406.00800), about 0.0001: peaks of weights are shrunk first; null leaves them.
        accumulator_bits: codes are chosen so that no sum of products with the codes of inputs, over `accumulator_tile`
            inputs, can leave an accumulator of so many bits (AXE, arXiv 2409.17092), and that is proved. It needs
            inputs that are integer codes; null sets no bound.
        accumulator_tile: inputs that are added up in it; it divides the groups that share a scale.
        accumulator_widen: scales are made larger where weights over them would not fit, as they mostly do not at few
            bits; without it codes are cut off, as in the paper.
    """

    rounds_weights: ClassVar[bool] = True

    safe: bool = True
    magr: float | None = None
    accumulator_bits: int | None = None
    accumulator_tile: int = 128
    accumulator_widen: bool = True

    def __post_init__(self) -> None:
        if self.magr is not None and self.magr <= 0:
            raise RecipeError(f"{self.name}: magr={self.magr:g} is not above 0; use 0.0001, or null for none")
        bits = self.accumulator_bits
        if self.accumulator_tile < 1 or (bits is not None and not 2 <= bits <= 48):
            given = f"accumulator_bits={bits} and accumulator_tile={self.accumulator_tile}"
            raise RecipeError(f"{self.name}: {given}; use 2 to 48 bits, and tiles of at least one input")

    @property
    def groups(self) -> Groups:
        """Whether parameters of groups are chosen ahead, or each when its turn comes."""
        return "static"

    @property
    def clipping(self) -> AwqClip | None:
        """How ranges are searched; None where they are the spec's own."""
        return None

    @property
    def clips_scores(self) -> bool:
        """Whether ranges of weights that make queries and keys are searched, too."""
        return False

    @abstractmethod
    def method(self) -> Method:
        """The method for one matrix."""

    def begin(self, setup: Setup) -> Worker:
        """The worker for one run of the engine."""
        return RoundingWorker(self, setup)


class RoundingWorker(Worker):
    """Rounds each weight at the first stage that reads it; several readers there are summed.

    Experts are rounded one by one, each by its own tokens; one that saw too few, by those of all. Weights that no
    product reads (tables), and those of convolutions, are rounded to nearest at the end.
    """

    def __init__(self, made: Rounding, setup: Setup) -> None:
        self.made, self.setup, self.method = made, setup, made.method()
        follows = self.method.follows_float and setup.settings.propagate == "quantized"
        self.needs_quantized = setup.settings.propagate == "quantized"
        self.needs_float = follows or not self.needs_quantized
        self.places = find_places(setup, follows)
        self.report, self.cached = Report(), Cached()
        self.settled: set[int] = set()
        if self.method.follows_float and not follows and not isinstance(self.method, GPFQ):
            self.report.note(f"propagate: float shows no rounded inputs, so that {self.method} is plain GPTQ")
        scores = set() if made.clipping is None or made.clips_scores else made_for_scores(setup.program)
        self.unclipped = {p.number for p in self.places if any(read.product.node in scores for read in p.reads)}
        if self.unclipped:
            self.report.note(f"{len(self.unclipped)} weights make queries or keys; their ranges are not clipped")
        for place in self.places:
            self._how(place)  # refuses, before any work, what cannot be bounded

    def waiting(self) -> dict[str, str]:
        """Weights that a stage will still round."""
        left = [p for p in self.places if p.reads and p.number not in self.settled]
        return {node.name: place.qdq.source.name for place in left for node in place.qdq.dequantize}

    def targets(self) -> Sequence[Target]:
        """What reads a weight."""
        return [read.target for place in self.places for read in place.reads]

    def wants(self, stage: Stage) -> Sequence[Want]:
        """The inputs of weights that are rounded here."""
        return [want for _, wants in self._here(stage) for want in wants]

    def solve(self, stage: Stage, found: Mapping[Want, Collector], processes: Processes) -> Solved:
        """Codes and parameters of every weight of the stage."""
        jobs = []
        for place, wants in self._here(stage):
            grams = [collector for want in wants if isinstance(collector := found[want], InputGram)]
            cost = math.prod(place.qdq.source.meta["val"].shape)
            jobs.append(Job(cost, lambda place=place, grams=grams: self._round(place, grams)))  # type: ignore[misc]
        solved = Solved()
        for (place, _), (tensors, facts) in zip(self._here(stage), processes.deal(jobs), strict=True):
            solved.tensors |= {f"{place.number}.{name}": tensor for name, tensor in tensors.items()}
            solved.facts[str(place.number)] = facts
        return solved

    def apply(self, stage: Stage, solved: Solved) -> None:
        """Store codes in place of the weights."""
        for number, facts in solved.facts.items():
            place = self.places[int(number)]
            start = f"{number}."
            tensors = {k.removeprefix(start): t for k, t in solved.tensors.items() if k.startswith(start)}
            weight = self.setup.program.weight(place.qdq.source)
            where = free_key(self.setup.program, place.key, "codes")
            store_codes(self.setup.program, place.qdq, weight, _unpacked(tensors, place), self.report)
            self._tell(where, place, facts)
            later = sum(read.target not in stage.targets for read in place.reads)
            if later:
                readers = f"{later} of the {len(place.reads)} products that read it come in later stages"
                self.report.note(f"{place.key}: {readers}; it is rounded by what the others read")
            self.settled.add(place.number)

    def finish(self) -> Report:
        """Round to nearest what no stage reached."""
        program = self.setup.program
        for place in self.places:
            if place.number in self.settled:
                continue
            weight = program.weight(place.qdq.source)
            with naming(place.key):
                result = quantize_tensor(weight, place.qdq.spec, given_outer(program, place.qdq))
            store_codes(program, place.qdq, weight, result, self.report)
            unbounded = "; no accumulator bound is kept" if self.made.accumulator_bits and place.left else ""
            self.report.skip(place.key, f"rounded to nearest: {place.left or 'no stage reached it'}{unbounded}")
        if not self.places:
            self.report.note("no weight is marked for rounding; insert-qdq, before this pass, marks them")
        for padding in (self.setup.padding, self.setup.padding_float):
            for note in padding.notes():
                self.report.note(note)
        return self.report

    def _here(self, stage: Stage) -> list[tuple[Place, list[InputWant]]]:
        """Weights that this stage is the first to read, with what to collect for each."""
        there = set(stage.targets)
        found = []
        for place in self.places:
            wants = [read.want for read in place.reads if read.target in there]
            if wants and place.number not in self.settled:
                found.append((place, list(dict.fromkeys(wants))))
        return found

    def _how(self, place: Place) -> How:
        """How one weight is rounded. RecipeError where its accumulator cannot be bounded."""
        made, bound = self.made, None
        if made.accumulator_bits is not None and place.reads:
            bound = accumulator_of(
                self.setup.program, place, made.accumulator_bits, made.accumulator_tile, made.accumulator_widen
            )
        shrink = None if made.magr is None else MagR(made.magr)
        clip = None if place.number in self.unclipped else made.clipping
        return How(self.method, made.groups, shrink, clip, bound, made.safe)

    def _round(self, place: Place, inputs: list[InputGram]) -> Result:
        """One weight: a matrix, or a stack of them."""
        start = time.perf_counter()
        outer = given_outer(self.setup.program, place.qdq)
        with naming(place.key):
            weight = self.setup.program.weight(place.qdq.source)
            result, facts = round_weight(weight, place, inputs, self._how(place), outer, self.cached.of(inputs))
        facts["seconds"] = time.perf_counter() - start
        named = {"codes": result.codes, **result.parameters}
        return {name: tensor.cpu() for name, tensor in named.items()}, facts

    def _tell(self, where: str, place: Place, facts: Mapping[str, Any]) -> None:
        """Put the figures of a weight into the report."""
        numbers = {name: float(value) for name, value in facts.items() if isinstance(value, int | float)}
        self.report.measure(where, numbers)
        self.report.rewrote(place.key, f"{place.qdq.spec}: {facts['method']}")
        for line in facts["notes"]:
            self.report.note(f"{place.key}: {line}")


def _unpacked(tensors: Mapping[str, Tensor], place: Place) -> QTensor:
    """The quantized tensor of what was solved, its parameters in the order of its spec."""
    spec = place.qdq.spec
    names = [parameter.name for parameter in spec.parameters(tensors["codes"].shape)]
    scale, *rest = (tensors[name] for name in names)
    zero = None if spec.symmetric else rest.pop(0)
    return QTensor(tensors["codes"], scale, zero, spec, tuple(rest))
