"""The weights that a rounding pass works on, the products that read them, and what is collected of their inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from qcompile.calibration.chain import Target
from qcompile.calibration.inputs import InputWant
from qcompile.calibration.worker import Setup
from qcompile.ir.contractions import Contraction, find_contractions
from qcompile.passes.quantize.dealing import dealing
from qcompile.passes.quantize.sites import QDQ, weight_qdq


@dataclass(frozen=True, eq=False)
class Read:
    """A product that reads a weight: in the program that is quantized, and in the float one."""

    product: Contraction
    target: Target
    want: InputWant


@dataclass(frozen=True, eq=False)
class Place:
    """A weight to round, and its readers; `left` is the reason why it is rounded to nearest instead."""

    number: int
    key: str
    qdq: QDQ
    reads: tuple[Read, ...]
    left: str | None = None

    @property
    def experts(self) -> int | None:
        """The axis of the stored weight that stacks experts."""
        return self.reads[0].product.experts if self.reads else None


def find_places(setup: Setup, cross: bool) -> list[Place]:
    """Every weight that `insert-qdq` marked, in program order; `cross` asks for the float program's inputs as well."""
    plain = {c.node.name: c for c in find_contractions(setup.plain)}
    marks = weight_qdq(setup.program)
    owner = {node: i for i, mark in enumerate(marks) for node in (mark.quantize, *mark.dequantize)}
    readers: dict[int, list[Contraction]] = {}
    for c in find_contractions(setup.program):
        for number in {owner[node] for node in c.path if node in owner}:
            readers.setdefault(number, []).append(c)
    return [_place(setup, number, mark, readers.get(number, []), plain, cross) for number, mark in enumerate(marks)]


def _place(
    setup: Setup, number: int, mark: QDQ, readers: list[Contraction], plain: Mapping[str, Contraction], cross: bool
) -> Place:
    key = setup.program.key(mark.source)
    reason = _obstacle(mark, readers, plain)
    if reason is not None:
        return Place(number, key, mark, (), reason)
    reads = []
    for c in readers:
        found = _read(setup, key, c, plain[c.node.name], cross)
        if isinstance(found, str):
            return Place(number, key, mark, (), found)
        reads.append(found)
    return Place(number, key, mark, tuple(reads))


def _obstacle(mark: QDQ, readers: list[Contraction], plain: Mapping[str, Contraction]) -> str | None:
    if not readers:
        return "no product reads it, as a table that is looked up in"
    for c in readers:
        if c.kernel or c.groups > 1:
            return f"{c.op} slides a window over its input"
        if c.node.name not in plain:
            return f"{c.node.name} is no product with a weight in the float program"
    first = readers[0]
    names = {parameter.name for parameter in mark.spec.parameters(first.weight.meta["val"].shape)}
    if first.experts is not None and any(name.endswith(("_step", "_offset", "exponent")) for name in names):
        return f"{mark.spec} shares parameters among experts, which are rounded one by one"
    return None


def _read(setup: Setup, key: str, c: Contraction, float_c: Contraction, cross: bool) -> Read | str:
    of_float = setup.settings.propagate == "float"
    seen = float_c if of_float else c
    dealt = dealt_float = None
    if c.experts is not None:
        dealt = dealing(setup.plain if of_float else setup.program, seen)
        if dealt is None:
            return f"which of its experts sees which token cannot be read off {c.op}"
        dealt_float = dealing(setup.plain, float_c)
    alike = dealt is None or (dealt.lines_up and dealt_float is not None and dealt_float.kind == dealt.kind)
    other = float_c.input if cross and alike and not of_float else None
    where = f"the input of {setup.program.module_of(c.node) or key}"
    padding = setup.padding_float if of_float else setup.padding
    want = InputWant(
        where,
        seen.input,
        other,
        seen.input_axis,
        float_c.input_axis,
        dealt,
        of_float,
        padding,
        setup.padding_float,
        None if other is None else dealt_float,
        setup.settings.sums == "int8",
    )
    return Read(c, Target(float_c.node, float_c.input), want)
