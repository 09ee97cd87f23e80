"""Widen one space: what grows, whether every operator takes it, and the edits.

All is decided on fake tensors before anything is edited.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from math import prod, sqrt
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher

from qcompile.ir.contractions import Contraction, Embedding, short_name
from qcompile.ir.edits import AlongAxis
from qcompile.ir.program import Program
from qcompile.passes.permute.growth import Grown, Growth, of_layout, of_placement
from qcompile.passes.permute.literals import AS_THEY_ARE, FINITE, KEEP_ZERO, rewritten
from qcompile.spaces import ChannelSpaces, Space

aten = torch.ops.aten


class Refusal(Exception):
    """A space cannot be widened; says why."""


@dataclass
class Widening:
    """What widening a space by `extra` channels changes: weights by axis, arguments, and the values of nodes."""

    spaces: ChannelSpaces
    space: Space
    extra: int
    products: dict[fx.Node, Contraction | Embedding]
    weights: dict[tuple[fx.Node, int], Growth] = field(default_factory=dict)
    grown: dict[fx.Node, list[Grown | None]] = field(default_factory=dict)  # by output of the node
    arguments: dict[fx.Node, dict[str, Any]] = field(default_factory=dict)
    affected: list[fx.Node] = field(default_factory=list)

    @property
    def program(self) -> Program:
        """The program that changes."""
        return self.spaces.program

    # ------------------------------------------------------------------ deciding

    def decide(self) -> None:
        """Find all that changes. Raises Refusal."""
        self._weights()
        self._values()
        self._readers()
        order = {node: place for place, node in enumerate(self.program.graph.nodes)}
        paths = [step for node in self._touched() for step in self.products[node].path]
        nodes = {*(n for n in self.grown if n.op == "call_function"), *self._touched(), *paths}
        self.affected = sorted(nodes, key=lambda n: order[n])
        for node, grown in self.grown.items():
            if node.op == "call_function":
                self._operator(node, grown)
        self._try()

    def _weights(self) -> None:
        for p in self.space.placements:
            if p.use.weight is None:
                continue
            found = of_placement(p, self.space, self.extra)
            key = repr(self.program.key(p.use.weight))
            if isinstance(found, str):
                raise Refusal(f"weight {key} {found}")
            axis, growth = found
            if self.weights.setdefault((p.use.weight, axis), growth) != growth:
                raise Refusal(f"weight {key} is read in two ways")

    def _values(self) -> None:
        """Every node that holds channels of the space, from its sources on."""
        waiting = [p.node for p in self.space.sources]
        while waiting:
            node = waiting.pop()
            if node in self.grown:
                continue
            layout = self.spaces.layouts.get(node)
            parts = layout if isinstance(layout, list) else [layout]
            grown: list[Grown | None] = []
            for part in parts:
                found = of_layout(self.spaces, self.space, part, self.extra) if part is not None else None
                if isinstance(found, str):
                    raise Refusal(f"{node.name} {found}")
                grown.append(found)
            if any(grown):
                self.grown[node] = grown
                waiting += node.users

    def _readers(self) -> None:
        """Whatever reads the channels and does not pass them on is a product that is widened too."""
        sinks = {p.node for p in self.space.sinks}
        for node, grown in self.grown.items():
            for user in node.users:
                if user in self.grown or user in sinks:
                    continue
                if user.target is operator.getitem and grown[int(user.args[1])] is None:  # type: ignore[arg-type]
                    continue  # another part of what was split
                if user.target is aten.sym_size.int and (grown[0] is None or user.args[1] != grown[0][0]):
                    continue
                how = "goes out of the program" if user.op == "output" else f"is read by {user.name} as a whole"
                raise Refusal(f"{node.name} {how}")

    def _touched(self) -> list[fx.Node]:
        """Products and lookups whose weights grow."""
        return [p.node for p in self.space.placements if p.node in self.products]

    def _operator(self, node: fx.Node, grown: list[Grown | None]) -> None:
        """Whether an operator may see new channels, and its arguments for them."""
        if node in self.products:
            if getattr(self.products[node], "groups", 1) > 1:
                raise Refusal(f"{node.name} convolves groups of channels")
            return
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta["val"], Tensor)]
        normed = bool(self.space.of_kind("norm"))
        if node.target in KEEP_ZERO:
            foreign = [n for n in node.args[:2] if n not in self.grown] if short_name(node) in ("add", "sub") else []
            if normed and foreign:
                raise Refusal(f"{node.name} adds {foreign[0]} to channels that a norm reads")
        elif node.target in FINITE:
            if normed:
                raise Refusal(f"{node.name} ({short_name(node)}) need not keep a channel at 0, and a norm reads it")
        elif node.target not in AS_THEY_ARE:
            raise Refusal(f"{node.name} ({node.target}) is not known to leave other channels as they are")
        source = next((n for n in tensors if n in self.grown), None)
        changed = rewritten(self.program, node, grown, self.grown[source][0] if source is not None else None)
        if isinstance(changed, str):
            raise Refusal(f"{node.name} {changed}")
        if node.target is aten.rms_norm.default:
            changed["eps"] = self._eps(node)
        if changed:
            self.arguments[node] = changed

    def _eps(self, norm: fx.Node) -> float:
        """ε·n/n′: the mean of squares is now over n′ channels."""
        eps = self.program.arg(norm, "eps")
        x = self.program.arg(norm, "input")
        eps = torch.finfo(x.meta["val"].dtype).eps if eps is None else eps
        return float(eps) * self.space.width / (self.space.width + self.extra)

    def _try(self) -> None:
        """Infer every changed value, on the side."""
        program, values = self.program, dict[fx.Node, Any]()
        shapes: dict[fx.Node, list[Any]] = {}
        for (weight, axis), growth in self.weights.items():
            shape = shapes.setdefault(weight, list(weight.meta["val"].shape))
            shape[axis] = growth.new_size
        for weight, shape in shapes.items():
            values[weight] = program.fake(shape, weight.meta["val"].dtype)

        def value(n: fx.Node) -> Any:
            return values.get(n, n.meta["val"])

        for node in self.affected:
            args, kwargs = _with(program, node, self.arguments.get(node, {}))
            try:
                with program.fake_mode, enable_python_dispatcher(), torch.no_grad():
                    values[node] = node.target(*fx.map_arg(args, value), **fx.map_arg(kwargs, value))  # type: ignore[operator]
            except (RuntimeError, ValueError, TypeError, IndexError, AssertionError) as error:
                raise Refusal(f"{node.name} does not take more channels: {str(error).splitlines()[0]}") from None
            self._same(node, values[node])

    def _same(self, node: fx.Node, now: Any) -> None:
        """The new value has the shape that is expected of it."""
        olds, news = ([v] if isinstance(v, Tensor) else list(v) for v in (node.meta["val"], now))
        on_path = node not in self.grown and node not in self.products
        for old, new, grown in zip(olds, news, self.grown.get(node, [None] * len(olds)), strict=True):
            wanted = list(old.shape)
            if grown is not None:
                wanted[grown[0]] = grown[1].new_size
            if not on_path and any(isinstance(w, int) and w != n for w, n in zip(wanted, new.shape, strict=True)):
                raise Refusal(f"{node.name} would give {list(new.shape)} where {wanted} is wanted")

    # ------------------------------------------------------------------ editing

    def commit(self) -> tuple[int, int]:
        """Edit. Returns the number of elements of all changed weights, before and after."""
        program = self.program
        norms = [n for n in self.grown if n.target is aten.rms_norm.default]
        scaled = self._scale(norms)
        touched = {weight for weight, _ in self.weights}
        before = sum(prod(weight.meta["val"].shape) for weight in touched)
        for (weight, axis), growth in self.weights.items():
            program.edit_weight(weight, AlongAxis(axis, growth.apply, growth.new_size))
        for weight, axis in scaled:
            program.edit_weight(weight, AlongAxis(axis, _times(self.factor)))
        for node, changed in self.arguments.items():
            for name, new in changed.items():
                program.set_arg(node, name, new)
        for node in self.affected:
            program.infer(node)
        return before, sum(prod(weight.meta["val"].shape) for weight in touched)

    @property
    def factor(self) -> float:
        """√(n/n′): what a norm over n′ channels, of which only n are not 0, gives too much."""
        return sqrt(self.space.width / (self.space.width + self.extra))

    def _scale(self, norms: list[fx.Node]) -> list[tuple[fx.Node, int]]:
        """Weights, by axis, that take the factor of each norm; where none can, it is multiplied by behind the norm."""
        scaled: dict[tuple[fx.Node, int], None] = {}
        for norm in norms:
            gain = self.program.arg(norm, "weight")
            if gain is not None and self.program.is_weight(gain) and all(u in norms for u in gain.users):
                scaled[gain, 0] = None
                continue
            sinks = [self.products.get(user) for user in norm.users]
            if gain is None and all(isinstance(c, Contraction) and _alone(c, norm) for c in sinks):
                scaled |= {(c.weight, c.axis_in): None for c in sinks if isinstance(c, Contraction)}
                continue
            product = self.program.call(aten.mul.Tensor, (norm, self.factor), after=norm)
            for user in list(norm.users):
                if user is not product:
                    user.replace_input_with(norm, product)
            self.affected.insert(self.affected.index(norm) + 1, product)
        return list(scaled)


def _alone(c: Contraction, norm: fx.Node) -> bool:
    """Whether a product is all that reads its weight, and reads nothing else of the norm's."""
    steps = (c.weight, *c.path)
    return c.input is norm and all(len(step.users) == 1 for step in steps)


def _times(factor: float) -> Callable[[Tensor], Tensor]:
    def times(values: Tensor) -> Tensor:
        return values * factor

    return times


def _with(program: Program, node: fx.Node, changed: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The arguments of a call with some of them changed."""
    args, kwargs = list(node.args), dict(node.kwargs)
    names = [a.name for a in node.target._schema.arguments] if changed else []  # type: ignore[union-attr]
    for name, new in changed.items():
        place = names.index(name)
        if place < len(args):
            args[place] = new
        else:
            kwargs[name] = new
    return tuple(args), kwargs
