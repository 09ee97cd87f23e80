"""Which calls depend on weights and literals alone, and what they come to.

A weight that is only moved or cast computes nothing: it is still that weight, and its readers look through the moves.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.ir.moves import MOVES
from qcompile.ir.program import Program
from qcompile.ir.types import dim_expr


class Constants:
    """The calls of a program that depend on weights and literals alone, each of at most `max_elements`.

    Quantization of weights is never among them: it is the business of the passes that round. Nor is what draws
    random numbers, or has a symbolic shape.
    """

    def __init__(self, program: Program, max_elements: int) -> None:
        self.program, self.max_elements = program, max_elements
        self.known: dict[fx.Node, bool] = {}

    def __contains__(self, node: object) -> bool:
        """Whether `node` is a call, or a small weight, that does not depend on the inputs."""
        if not isinstance(node, fx.Node):
            return False
        if node not in self.known:
            self.known[node] = self._decide(node)
        return self.known[node]

    def _decide(self, node: fx.Node) -> bool:
        if node.op == "placeholder":
            return self.program.is_weight(node) and _static(node.meta["val"], self.max_elements)
        if node.op != "call_function" or not _folds(node.target):
            return False
        return _static(node.meta["val"], self.max_elements) and all(source in self for source in node.all_input_nodes)

    def closure(self, node: fx.Node) -> list[fx.Node]:
        """The weights and calls that a constant is computed from, itself last, in program order."""
        order: dict[fx.Node, None] = {}

        def visit(member: fx.Node) -> None:
            if member not in order:
                for source in member.all_input_nodes:
                    visit(source)
                order[member] = None

        visit(node)
        return list(order)

    def computes(self, node: fx.Node) -> bool:
        """Whether any operator between the weights and `node` does more than move, cast or create."""
        return any(
            member.op == "call_function" and member.all_input_nodes and member.target not in MOVES
            for member in self.closure(node)
        )

    def value(self, node: fx.Node) -> Tensor:
        """What a constant comes to, with the program's own operators and dtypes."""
        values: dict[fx.Node, Any] = {}
        with torch.no_grad():
            for member in self.closure(node):
                if self.program.is_weight(member):
                    values[member] = self.program.weight(member)
                else:
                    args, kwargs = fx.map_arg((member.args, dict(member.kwargs)), values.__getitem__)
                    values[member] = member.target(*args, **kwargs)  # type: ignore[operator]
        result = values[node]
        assert isinstance(result, Tensor)
        return result.contiguous()

    def fold(self, node: fx.Node) -> fx.Node:
        """Store what `node` comes to under a new key and let its readers read that. Returns the placeholder.

        Where the store has the same value under that key already (a weight used twice), that one is read.
        """
        value, module = self.value(node), self.program.module_of(node)
        for key in _numbered(self._name(node)):
            if key not in self.program.weights:
                weight = self.program.add_weight(key, value, module=module)
                break
            found = self.program.weight_node(key)
            if found is not None and _equal(self.program.weight(found), value):
                weight = found
                break
        self.program.replace(node, weight)
        return weight

    def _name(self, node: fx.Node) -> str:
        """A key that tells what was done: ``norm.weight.plus_one``, ``mixer.A_log.exp.neg``."""
        members = self.closure(node)
        weights = [m for m in members if self.program.is_weight(m)]
        steps = [_step(m) for m in members if m.op == "call_function" and m.target not in MOVES]
        if len(weights) == 1 and steps:
            return ".".join([self.program.key(weights[0]), *steps])
        return ".".join(filter(None, [self.program.module_of(node), node.name]))


def _folds(target: Any) -> bool:
    if target is operator.getitem:
        return True
    if not isinstance(target, OpOverload) or target.namespace != "aten" or target._schema.is_mutable:
        return False
    return torch.Tag.nondeterministic_seeded not in target.tags


def _static(value: Any, max_elements: int) -> bool:
    if isinstance(value, (tuple, list)):
        return all(_static(v, max_elements) for v in value)
    if not isinstance(value, Tensor):
        return False
    sizes = [dim_expr(d) for d in value.shape]
    total = 1
    for size in sizes:
        if not isinstance(size, int):
            return False
        total *= size
    return total <= max_elements


def _step(node: fx.Node) -> str:
    assert isinstance(node.target, OpOverload)
    name = node.target._schema.name.partition("::")[2]
    literals = [a for a in node.args if not isinstance(a, fx.Node)]
    return "plus_one" if name == "add" and literals == [1] else name


def _equal(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a, b)


def _numbered(name: str) -> Iterator[str]:
    yield name
    count = 2
    while True:
        yield f"{name}_{count}"
        count += 1
