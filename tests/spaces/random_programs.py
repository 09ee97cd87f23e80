"""Random programs that a function-preserving pass must leave the same function, and the check that it does.

A program is a `Plan`: plain data, whose digits stand for every choice made on the way. Digits of 0, and fewer of them,
make plainer programs; so hypothesis shrinks a failing plan to something that can be read, and `simplest` does the same
without it. Weights are float64 and follow from the plan's seed and their own names: a plan with a block less has the
same weights in the blocks that are left.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from hypothesis import strategies as st
from torch import Tensor

from qcompile.drift import drift
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr
from qcompile.pass_base import Report, parse_pipeline
from qcompile.pass_manager import PassManager

from .random_blocks.graph import Dice, Graph
from .random_blocks.heads import head
from .random_blocks.stems import stem
from .random_blocks.wiring import LAYERS, block

Digits = tuple[int, ...]

PIPELINES = [
    "raise-norms",
    "drop-identities",
    "fold-constants",
    "dead-code",
    "fold-constants, raise-norms, drop-identities, dead-code",
    "raise-norms, fold-norm-affine",
    "raise-norms, center-norm",
    "raise-norms, fold-embedding-norm, fold-norm-affine, center-norm, rotate(qk=true, orphans=true)",
    "raise-norms, rotate(mode=random, stream=false), rotate-layerwise(block=2)",
    "raise-norms, equalize",
    "raise-norms, permute",
    "raise-norms, permute(arrange=even, group=4)",
    "raise-norms, expand",
    "raise-norms, fold-norm-affine, center-norm, rotate(orphans=true, joint=true)",
    "raise-norms, fold-norm-affine, center-norm, expand(stream=true), rotate(mode=hadamard)",
    "raise-norms, untie-embeddings, permute, equalize, fold-norm-affine, center-norm, permute, rotate, rotate-layerwise",
]
"""Every function-preserving pass, alone and in chains."""

TOLERANCE = 1e-9
SIZES = ({"b": 2, "s": 5, "m": 3}, {"b": 3, "s": 4, "m": 6})
_SIDES = 720  # a digit is below 6!: most numbers of options divide it
_ROOM = 1e-11  # how far rounding each weight at 1e-15 may move the outputs of a program that is checked to TOLERANCE


@dataclass(frozen=True)
class Block:
    """One block of the stream: the kind of its layer, and the digits of its choices."""

    kind: str
    digits: Digits = ()


@dataclass(frozen=True)
class Plan:
    """All that a random program follows from; its `repr` is Python that makes it again."""

    blocks: tuple[Block, ...] = ()
    stem: Digits = ()
    head: Digits = ()
    symbolic: bool = False
    seed: int = 0


@dataclass(frozen=True)
class Outcome:
    """What a pipeline did to one program: a report for each pass, and the worst drift over outputs and sizes."""

    reports: tuple[Report, ...]
    drift: float
    changed: bool


class Mismatch(AssertionError):
    """A pipeline changed what a program computes, by `drift`."""

    def __init__(self, message: str, drift: float) -> None:
        super().__init__(message)
        self.drift = drift


def build(plan: Plan) -> Program:
    """The program of a plan."""
    g = Graph(plan.symbolic, plan.seed)
    began = x = stem(g, Dice(plan.stem))
    for index, one in enumerate(plan.blocks):
        g.scope = f"layers.{index}"
        x = block(g, Dice(one.digits), one.kind, x, began)
    head(g, Dice(plan.head), x)
    return g.program()


def random_plan(seed: int) -> Plan:
    """A plan of one to three blocks; one in ten has symbolic sizes."""
    dice = random.Random(seed)

    def digits(count: int) -> Digits:
        return tuple(dice.randrange(_SIDES) for _ in range(count))

    kinds = [*LAYERS, "attention", "attention", "mlp", "gated", "trap", "trap"]
    blocks = tuple(Block(dice.choice(kinds), digits(60)) for _ in range(dice.choice((1, 1, 2, 2, 3))))
    return Plan(blocks, digits(12), digits(16), dice.random() < 0.1, seed)


def random_program(seed: int) -> Program:
    """A valid program with float64 weights and finite outputs; the same for the same seed.

    A plan that overflows, or moves its outputs by rounding alone, is left for the next of its seed's line.
    """
    return build(usable_plan(seed))


def usable_plan(seed: int) -> Plan:
    """The first plan of a seed's line whose program `is_usable`."""
    plan = random_plan(seed)
    for attempt in range(1, 20):
        if is_usable(build(plan)):
            return plan
        plan = random_plan(seed + attempt * 1_000_003)
    raise AssertionError(f"20 plans from seed {seed} gave no usable program")


def is_usable(program: Program) -> bool:
    """Whether its outputs are finite, and follow its weights closely enough to be compared at TOLERANCE."""
    given = next(feeds(program))
    before = program.run(given)
    if not all(bool(torch.isfinite(t).all()) for t in before.values()):
        return False
    nudged = program.clone()
    noise = torch.Generator().manual_seed(0)
    for key in list(nudged.weights):
        if (tensor := nudged.weights[key]).is_floating_point():
            sign = torch.randint(0, 2, tensor.shape, generator=noise).to(tensor.dtype) * 2 - 1
            nudged.weights[key] = tensor * (1 + 1e-15 * sign)
    return drift(nudged.run(given), before) <= _ROOM


def plans() -> st.SearchStrategy[Plan]:
    """Plans that shrink towards fewer blocks, the plainest kind, and digits of 0."""
    digit = st.integers(0, _SIDES - 1)

    def digits(count: int) -> st.SearchStrategy[Digits]:
        return st.lists(digit, max_size=count).map(tuple)

    blocks = st.lists(st.builds(Block, st.sampled_from(list(LAYERS)), digits(40)), max_size=3).map(tuple)
    symbolic = st.sampled_from([False] * 9 + [True])
    return st.builds(Plan, blocks, digits(12), digits(16), symbolic, st.integers(0, 99))


def programs() -> st.SearchStrategy[Program]:
    """Programs of `plans` that are usable."""
    return plans().map(build).filter(is_usable)


def feeds(program: Program) -> Iterator[dict[str, Tensor]]:
    """Random inputs, twice; of other sizes the second time where the program's are symbolic."""
    for seed, sizes in enumerate(SIZES):
        generator = torch.Generator().manual_seed(seed)
        yield {node.name: _feed(program, node.meta["val"], sizes, generator) for node in program.inputs}


def _feed(program: Program, value: Tensor, sizes: dict[str, int], generator: torch.Generator) -> Tensor:
    names = {symbol: sizes[name] for symbol, name in program.symbols.items()}
    shape = [d if isinstance(d, int) else int(d.subs(names)) for d in map(dim_expr, value.shape)]
    if value.dtype.is_floating_point:
        return torch.randn(shape, generator=generator, dtype=value.dtype)
    if value.dtype == torch.bool:
        mask = torch.rand(shape, generator=generator) > 0.3
        mask[..., 0] = True  # every query sees something
        return mask
    return torch.randint(0, 2, shape, generator=generator)


def check(program: Program, pipeline: str) -> Outcome:
    """Run `pipeline` on a copy of `program` and compare all outputs on random inputs, in float64.

    Raises Mismatch where max |Δ| / max |output| is over TOLERANCE, or an output is missing.
    """
    copy = program.clone()
    reports = PassManager(parse_pipeline(pipeline)).run(copy)
    worst = 0.0
    for given in feeds(program):
        worst = max(worst, drift(copy.run({n.name: given[n.name] for n in copy.inputs}), program.run(given)))
    if copy.output_names != program.output_names or not worst <= TOLERANCE:
        outputs = f"{list(program.output_names)} ⟶ {list(copy.output_names)}"
        raise Mismatch(f"{pipeline} moved the outputs by {worst:.2e} of their maximum ({outputs})", worst)
    return Outcome(tuple(reports), worst, str(copy) != str(program) or any(r.rewritten for r in reports))


def simplest(plan: Plan, fails: Callable[[Plan], bool], tries: int = 400) -> Plan:
    """A plainer plan for which `fails` still holds, by trying one change after the other."""
    changed = True
    while changed and tries > 0:
        changed = False
        for candidate in _plainer(plan):
            tries -= 1
            if fails(candidate):
                plan, changed = candidate, True
                break
            if tries <= 0:
                break
    return plan


def _plainer(plan: Plan) -> Iterator[Plan]:
    """Plans with a block less, fixed sizes, fewer digits, or one digit 0; the largest steps first."""
    for i in range(len(plan.blocks)):
        yield dataclasses.replace(plan, blocks=plan.blocks[:i] + plan.blocks[i + 1 :])
    if plan.symbolic:
        yield dataclasses.replace(plan, symbolic=False)
    for i, one in enumerate(plan.blocks):
        for digits in _fewer(one.digits):
            blocks = (*plan.blocks[:i], Block(one.kind, digits), *plan.blocks[i + 1 :])
            yield dataclasses.replace(plan, blocks=blocks)
    for digits in _fewer(plan.stem):
        yield dataclasses.replace(plan, stem=digits)
    for digits in _fewer(plan.head):
        yield dataclasses.replace(plan, head=digits)


def _fewer(digits: Digits) -> Iterator[Digits]:
    for keep in (0, len(digits) // 4, len(digits) // 2, len(digits) * 3 // 4):
        if keep < len(digits):
            yield digits[:keep]
    if digits and len(digits) <= 24:
        yield digits[:-1]
    for i, digit in enumerate(digits):
        if digit:
            yield (*digits[:i], 0, *digits[i + 1 :])
