"""What running part of a program takes, read off its shapes: bytes that are alive, operations, bytes moved.

Nothing is run and no weight is read. Symbolic sizes are those of a batch; a size that the data decides (how many tokens
an expert is given, say) is taken for the number of tokens.
"""

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.calibration.slices import Slice
from qcompile.ir.program import Program
from qcompile.ir.text import target_name
from qcompile.ir.types import dim_expr

aten = torch.ops.aten

_PRODUCTS = ("linear", "mm", "addmm", "matmul", "bmm", "baddbmm", "addbmm", "mv")
_SUMMED = {"addmm": 1, "baddbmm": 1, "addbmm": 1}  # the argument whose last axis is summed over, where it is not 0


class Sizes:
    """The sizes of a program's values for one batch, given as the shapes of its inputs by name."""

    def __init__(self, program: Program, shapes: Mapping[str, tuple[int, ...]]) -> None:
        self.known: dict[sympy.Symbol, int] = {}
        given = [
            (expr, size)
            for node in program.inputs
            if isinstance(node.meta["val"], Tensor) and node.name in shapes
            for expr, size in zip(map(dim_expr, node.meta["val"].shape), shapes[node.name], strict=True)
        ]
        for expr, size in sorted(given, key=lambda pair: len(getattr(pair[0], "free_symbols", ()))):
            self._learn(expr, size)
        self.otherwise = max((math.prod(shape[:2]) for shape in shapes.values()), default=1)
        self._found: dict[Any, int] = {}

    def of(self, size: Any) -> int:
        """A size as a number."""
        expr = dim_expr(size)
        if isinstance(expr, int):
            return expr
        if expr not in self._found:
            unknown = {s: self.otherwise for s in expr.free_symbols if s not in self.known}
            self._found[expr] = int(expr.xreplace({**self.known, **unknown}))
        return self._found[expr]

    def shape(self, value: Tensor) -> tuple[int, ...]:
        """A shape in numbers."""
        return tuple(self.of(size) for size in value.shape)

    def count(self, value: Any) -> int:
        """Elements of a tensor, or of several."""
        if isinstance(value, Tensor):
            return math.prod(self.shape(value))
        return sum(self.count(each) for each in value) if isinstance(value, (list, tuple)) else 0

    def bytes(self, value: Any) -> int:
        """Bytes of a tensor, or of several."""
        if isinstance(value, Tensor):
            return math.prod(self.shape(value)) * value.dtype.itemsize
        return sum(self.bytes(each) for each in value) if isinstance(value, (list, tuple)) else 0

    def _learn(self, expr: Any, size: int) -> None:
        """What a size says of the one symbol in it that is not known yet."""
        if isinstance(expr, int):
            return
        unknown = [s for s in expr.free_symbols if s not in self.known]
        if len(unknown) == 1:
            rest = expr.xreplace({s: v for s, v in self.known.items() if s in expr.free_symbols})
            solved = [s for s in sympy.solve(rest - size, unknown[0]) if s.is_integer]
            if solved:
                self.known[unknown[0]] = int(solved[0])


@dataclass(frozen=True)
class SliceCost:
    """What a slice takes for one batch.

    `weights`: bytes of what weights alone decide, held as long as the slice; `making`: bytes beside them while they are
    made; `peak`: most bytes of a batch's own values at any time; `outputs`: those that are left; `flops` and `moved`
    of a batch, `moved_once` of the weights.
    """

    weights: int = 0
    making: int = 0
    peak: int = 0
    outputs: int = 0
    flops: int = 0
    moved: int = 0
    moved_once: int = 0


def slice_cost(part: Slice, sizes: Sizes) -> SliceCost:
    """What a slice takes for a batch of such sizes."""
    run, outputs = set(part.nodes) - part.fixed, set(part.outputs.values())
    held = [n for n in part.fixed if n in outputs or any(user in run for user in n.users)]
    weights = [sizes.bytes(n.meta["val"]) for n in held]
    peak, left = _alive(part, sizes)
    return SliceCost(
        weights=sum(weights),
        making=max((_making(n, sizes) for n in held), default=0),
        peak=peak,
        outputs=left,
        flops=sum(flops(n, sizes) for n in run),
        moved=sum(_moved(n, sizes) for n in run),
        moved_once=sum(_moved(n, sizes) for n in part.fixed),
    )


def _making(node: fx.Node, sizes: Sizes) -> int:
    """Bytes beside a weight while it is read and cast, or while codes are decoded."""
    size = sizes.bytes(node.meta["val"])
    return size // 2 if node.op == "placeholder" else 2 * size


def flops(node: fx.Node, sizes: Sizes) -> int:
    """Operations of one call, a multiplication and an addition counted as two; 0 for what is no product.

    >>> text = "def main(x: f32[2, 3], *, w: f32[4, 3]):\\n    y = aten.linear.default(x, w)\\n    return {'y': y}"
    >>> program = Program.parse(text)
    >>> flops(program.nodes[0], Sizes(program, {"x": (2, 3)}))
    48
    """
    name = target_name(node.target).split(".")[-2:][0]
    result = node.meta["val"]
    if not isinstance(result, Tensor) or not isinstance(node.target, OpOverload):
        return 0
    if name in _PRODUCTS:
        first = _value(node.args[_SUMMED.get(name, 0)])
        return 2 * sizes.count(result) * sizes.of(first.shape[-1]) if isinstance(first, Tensor) else 0
    if "grouped_mm" in name:
        return 2 * sizes.count(result) * sizes.of(_value(node.args[0]).shape[-1])
    if name.startswith("conv"):
        kernel = sizes.shape(_value(node.args[1]))
        return 2 * sizes.count(result) * math.prod(kernel[1:])
    if name == "einsum":
        return _einsum(node, sizes)
    if "attention" in name:
        query, key, value = (sizes.shape(_value(argument)) for argument in node.args[:3])
        return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])
    return 0


def _einsum(node: fx.Node, sizes: Sizes) -> int:
    """2 × the product of all sizes that the equation names."""
    terms = str(node.args[0]).partition("->")[0].replace(" ", "").replace(".", "").split(",")
    named: dict[str, int] = {}
    rest = 1
    for term, source in zip(terms, node.args[1], strict=True):  # type: ignore[arg-type]
        shape = sizes.shape(_value(source))
        named |= dict(zip(term[::-1], shape[::-1], strict=False))
        rest = max(rest, math.prod(shape[: len(shape) - len(term)]))
    return 2 * math.prod(named.values()) * rest


def _value(argument: Any) -> Any:
    return argument.meta["val"] if isinstance(argument, fx.Node) else argument


def _alive(part: Slice, sizes: Sizes) -> tuple[int, int]:
    """Most bytes of values at any time, and those at the end. A view lives in what it is a view of."""
    roots: dict[fx.Node, fx.Node] = {}
    holders: Counter[fx.Node] = Counter()
    given = set(part.inputs.values())
    now = most = 0
    for node in part.nodes:
        if node in part.fixed:
            continue
        root = roots[node] = roots.get(node.all_input_nodes[0], node.all_input_nodes[0]) if _is_view(node) else node
        if root is node:
            now += sizes.bytes(node.meta["val"])
            most = max(most, now)
        holders[root] += 1
        for dead in part.last_use.get(node, ()):
            if dead in given or dead not in roots:
                continue
            holders[roots[dead]] -= 1
            if not holders[roots[dead]] and roots[dead] in roots:
                now -= sizes.bytes(roots[dead].meta["val"])
    return most, now


def _moved(node: fx.Node, sizes: Sizes) -> int:
    """Bytes that a call reads and writes."""
    if node.op != "call_function" or _is_view(node):
        return 0
    return sum(sizes.bytes(n.meta["val"]) for n in (node, *node.all_input_nodes))


def _is_view(node: fx.Node) -> bool:
    if not node.all_input_nodes:
        return False
    if node.target is operator.getitem:
        return True
    if not isinstance(node.target, OpOverload):
        return False
    if node.target.overloadpacket is aten.to:
        source, result = node.all_input_nodes[0].meta["val"], node.meta["val"]
        return isinstance(source, Tensor) and isinstance(result, Tensor) and source.dtype == result.dtype
    return node.target.is_view or node.target.overloadpacket in (aten.contiguous, aten.reshape)
