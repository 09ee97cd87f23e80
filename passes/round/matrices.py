"""One stored weight as the matrices it holds, one or one for each expert: rounded one by one, and put together."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from qcompile.calibration.inputs import InputGram, together
from qcompile.calibration.statistics import Gram
from qcompile.numerics.qtensor import QTensor
from qcompile.passes.quantize.routing import FEWEST_TOKENS, LEAST_SHARE
from qcompile.passes.round.places import Place
from qcompile.rounding import (
    GPFQ,
    GPTQ,
    Accumulator,
    AwqClip,
    Factors,
    Figures,
    MagR,
    Method,
    Proof,
    Statistics,
    Stored,
    round_matrix,
)
from qcompile.rounding.solve import Groups


@dataclass(frozen=True)
class How:
    """How one weight is rounded; see `round_matrix`."""

    method: Method
    groups: Groups
    shrink: MagR | None
    clip: AwqClip | None
    accumulator: Accumulator | None
    safe: bool


class Cached:
    """What was factored of the input that was last asked for: queries, keys and values have one, and stand in a row."""

    def __init__(self) -> None:
        self._inputs: Sequence[InputGram] = ()
        self._factors = Factors()

    def of(self, inputs: Sequence[InputGram]) -> Factors | None:
        """What is known of the sums of `inputs`; None for experts, whose sums are many."""
        if any(i.want.experts is not None for i in inputs):
            return None
        if list(map(id, inputs)) != list(map(id, self._inputs)):
            self._inputs, self._factors = tuple(inputs), Factors()
        return self._factors


def round_weight(
    weight: Tensor,
    place: Place,
    inputs: Sequence[InputGram],
    how: How,
    outer: tuple[Tensor, ...],
    factors: Factors | None,
) -> tuple[QTensor, dict[str, Any]]:
    """The rounded weight, and its figures: of a stack, sums of tokens and means of errors over experts."""
    product, spec = place.reads[0].product, place.qdq.spec
    count = 1 if place.experts is None else weight.shape[place.experts]
    grams = [together([i.of[e] for i in inputs if e in i.of]) for e in range(count)]
    shared, poor = _shared(grams)
    results, figures, proofs, notes = [], [], [], []
    for expert in range(count):
        part = weight if place.experts is None else weight.narrow(place.experts, expert, 1)
        stored = Stored(spec, tuple(part.shape), product.axis_out, product.axis_in)
        gram = shared if expert in poor else grams[expert]
        here = how.method if gram.cross is not None or not how.method.follows_float else plain(how.method)
        mine = tuple(_of_expert(t, place.experts, expert, count) for t in outer)
        rounded = round_matrix(
            stored.matrix(part),
            stored,
            statistics(gram, stored.in_features),
            here,
            groups=how.groups,
            shrink=how.shrink,
            clip=how.clip,
            accumulator=how.accumulator,
            safe=how.safe,
            outer=mine,
            factors=factors,
        )
        results.append(rounded.result)
        figures.append(rounded.figures)
        proofs += [rounded.proof] if rounded.proof is not None else []
        notes += _notes(rounded.figures, "" if place.experts is None else f"expert {expert}: ")
    if poor:
        listed = ", ".join(f"{e} ({grams[e].tokens})" for e in poor)
        notes.append(f"experts that saw too few tokens are rounded by what all saw: expert (tokens) {listed}")
    proved = {} if how.accumulator is None else _proved(how.accumulator, proofs)
    return _stacked(results, place.experts), {**_facts(figures), **proved, "notes": notes}


def statistics(gram: Gram, width: int) -> Statistics:
    """What was collected, as rounding takes it; zeros where no token came."""
    if gram.hessian is None or gram.total is None:
        return Statistics(torch.zeros(width, width, dtype=torch.float64))
    count = max(1, gram.tokens)
    mean_float = None if gram.total_float is None else gram.total_float / count
    return Statistics(gram.hessian, gram.cross, gram.tokens, gram.total / count, mean_float)


def plain(method: Method) -> Method:
    """The method where the float program's inputs are not known: GPTQ with the same damping and order; GPFQ stays."""
    return (
        method
        if isinstance(method, GPFQ)
        else GPTQ(damping=float(getattr(method, "damping", 0.01)), order=method.order)
    )


def _shared(grams: list[Gram]) -> tuple[Gram, list[int]]:
    """The sum over experts, and those who saw too little to be judged by it alone."""
    if len(grams) == 1:
        return grams[0], []
    even = sum(g.tokens for g in grams) / len(grams)
    poor = [e for e, g in enumerate(grams) if g.tokens < max(FEWEST_TOKENS, LEAST_SHARE * even)]
    return (together(grams) if poor else Gram()), poor


def _of_expert(tensor: Tensor, axis: int | None, expert: int, count: int) -> Tensor:
    """An outer parameter of one expert; one that all share is taken as it is."""
    if axis is None or tensor.ndim <= axis or tensor.shape[axis] != count:
        return tensor
    return tensor.narrow(axis, expert, 1)


def _stacked(parts: list[QTensor], axis: int | None) -> QTensor:
    if axis is None:
        return parts[0]
    first = parts[0]
    zero = (
        None if first.zero_point is None else torch.cat([p.zero_point for p in parts if p.zero_point is not None], axis)
    )
    outer = tuple(torch.cat([p.outer[i] for p in parts], axis) for i in range(len(first.outer)))
    codes, scale = torch.cat([p.codes for p in parts], axis), torch.cat([p.scale for p in parts], axis)
    return QTensor(codes, scale, zero, first.spec, outer)


def _facts(figures: list[Figures]) -> dict[str, Any]:
    """The figures of one matrix, or of a stack."""
    tables = [asdict(f) for f in figures]
    facts: dict[str, Any] = {"method": tables[0]["method"], "rtn_kept": sum(f.fell_back is not None for f in figures)}
    facts |= {name: sum(t[name] for t in tables) for name in ("tokens", "dead")}
    for name in ("damping", "loss", "rtn_loss", "gap", "rtn_gap"):
        known = [t[name] for t in tables if t[name] is not None and math.isfinite(t[name])]
        if known:
            facts[name] = max(known) if name == "damping" else sum(known) / len(known)
    return facts


def _proved(accumulator: Accumulator, proofs: Sequence[Proof]) -> dict[str, int]:
    """The worst case of all matrices, as `AccumulatorEntry` of the manifest has it."""
    facts = {
        "bits": accumulator.bits,
        "tile": accumulator.tile,
        "input_min": accumulator.input_min,
        "input_max": accumulator.input_max,
        "highest": max(proof.highest for proof in proofs),
        "lowest": min(proof.lowest for proof in proofs),
        "limit": accumulator.limit,
        "holds": int(all(proof.holds for proof in proofs)),
    }
    return {f"accumulator_{name}": value for name, value in facts.items()}


def _notes(figures: Figures, who: str) -> list[str]:
    notes = []
    if figures.fell_back is not None:
        notes.append(f"{who}kept rounding to nearest: {figures.fell_back}")
    if len(figures.tried) > 1:
        tried = ", ".join(f"{d:g}" for d in figures.tried)
        notes.append(f"{who}no factorisation with damping {tried}; {figures.damping:g} worked")
    if figures.dead:
        notes.append(f"{who}{figures.dead} inputs are always 0; their columns are rounded to nearest")
    return notes
