"""Part of a program, run by itself: from some of its values to others.

    values at one place ──▶ nodes between ──▶ values at the next

What depends on weights alone (a dequantized weight, say) is computed once, when it is first needed, and lives as long
as the slice does. Masks, positions and rotary tables depend on inputs alone: they are computed again for every batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import QCompileError
from qcompile.ir.gathered import Gathered, call
from qcompile.ir.program import Program
from qcompile.linalg import linear

aten = torch.ops.aten


class Slice:
    """The nodes of `program` that lead from `inputs` to `outputs`, all given by name.

    Args:
        device: where it runs; None leaves tensors where they are.
        shared: weights that have been read, for slices of copies of one program that live side by side.
        instead: nodes, and the nodes that are read in their place, by name.
        halved: linear layers of float32 are computed in bfloat16.

    Raises QCompileError where a name is not in the program.
    """

    def __init__(
        self,
        program: Program,
        inputs: Iterable[str],
        outputs: Iterable[str],
        device: torch.device | None = None,
        shared: dict[int, Tensor] | None = None,
        instead: Mapping[str, str] | None = None,
        halved: bool = False,
    ) -> None:
        named = {node.name: node for node in program.graph.nodes}
        self.program, self.device = program, device
        self.inputs = {name: _known(named, name) for name in inputs}
        self.outputs = {name: _known(named, name) for name in outputs}
        given = set(self.inputs.values())
        self.instead = {_known(named, a): _known(named, b) for a, b in (instead or {}).items()}
        reached = _behind(self.outputs.values(), given, self.instead)
        self.nodes = [n for n in program.graph.nodes if n in reached and n.op == "call_function"]
        self.fixed = _from_weights(reached, self.nodes, self.instead)
        self.last_use = _last_uses(self.nodes, set(self.outputs.values()), self.fixed)
        self.feeds = [n for n in reached if n.op == "placeholder" and "weight" not in n.meta]
        self._constants: dict[fx.Node, Any] = {}
        self._shared, self._linear = shared, _InHalf() if halved else linear

    @property
    def weights(self) -> list[str]:
        """Keys of the weights it reads."""
        return [str(n.meta["weight"]) for n in self.fixed if "weight" in n.meta]

    def run(self, values: Mapping[str, Tensor], feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The outputs by name, from the inputs by name and the program's own; a number is a tensor without axes."""
        table: dict[fx.Node, Any] = {node: self._given(node, values[name]) for name, node in self.inputs.items()}
        table |= {node: self._here(feeds[node.name]) for node in self.feeds if node not in table}

        def value(node: fx.Node) -> Any:
            return self._constant(node) if node in self.fixed else table[node]

        with torch.no_grad():
            for node in self.nodes:
                if node in self.fixed:
                    continue
                table[node] = self._call(node, value)
                for dead in self.last_use.get(node, ()):
                    table.pop(dead, None)
        return {name: _kept(value(node)) for name, node in self.outputs.items()}

    def _call(self, node: fx.Node, value: Any) -> Any:
        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        if self.device is not None and "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        try:
            if node.target is aten.linear.default:
                return self._linear(*args, **kwargs)  # type: ignore[arg-type]
            return call(node, args, kwargs)
        except Exception as error:
            error.add_note(f"in {node.format_node()} of module {self.program.module_of(node)!r}")
            raise

    def _constant(self, node: fx.Node) -> Any:
        """What a node of the fixed part holds; only what the rest reads is kept."""
        if node not in self._constants:
            if node in self.instead:
                value = self._constant(self.instead[node])
            elif "weight" in node.meta:
                value = self._weight(node)
            else:
                value = self._call(node, self._constant)
                for source in node.all_input_nodes:
                    if all(user in self.fixed for user in source.users):  # codes, once they are decoded
                        self._constants.pop(source, None)
            self._constants[node] = value
        return self._constants[node]

    def _weight(self, node: fx.Node) -> Tensor:
        if self._shared is None:
            return self._here(self.program.weight(node))
        number = self.program.weights.identity(self.program.key(node))
        if number not in self._shared:
            self._shared[number] = self._here(self.program.weight(node))
        return self._shared[number]

    def _given(self, node: fx.Node, value: Tensor) -> Any:
        return self._here(value) if isinstance(node.meta["val"], Tensor) else value.item()

    def _here(self, value: Tensor) -> Tensor:
        return value if self.device is None else value.to(self.device, non_blocking=True)


class _InHalf:
    """Linear layers in bfloat16, each weight turned once."""

    def __init__(self) -> None:
        self._turned: dict[int, tuple[Tensor, Tensor]] = {}  # the weight as well, so that its number stays its own

    def __call__(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if x.dtype != torch.float32:
            return linear(x, weight, bias)
        if id(weight) not in self._turned:
            self._turned[id(weight)] = weight, weight.bfloat16()
        found = torch.nn.functional.linear(x.bfloat16(), self._turned[id(weight)][1]).float()
        return found if bias is None else found.add_(bias)


def _kept(value: Any) -> Tensor:
    if isinstance(value, Gathered):
        return value.whole
    if isinstance(value, Tensor):
        return value
    return torch.tensor(value, dtype=torch.float64 if isinstance(value, float) else None)


def _known(named: Mapping[str, fx.Node], name: str) -> fx.Node:
    if name not in named:
        raise QCompileError(f"the program has no value {name!r}; a pass took it away while the program was calibrated")
    return named[name]


def _behind(ends: Iterable[fx.Node], given: set[fx.Node], instead: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """`ends` and all they are computed from, not looking behind what is given."""
    reached, waiting = set[fx.Node](), list(ends)
    while waiting:
        node = waiting.pop()
        if node in reached:
            continue
        reached.add(node)
        if node not in given:
            waiting += [instead[node]] if node in instead else node.all_input_nodes
    return reached - given


def _from_weights(reached: set[fx.Node], nodes: list[fx.Node], instead: Mapping[fx.Node, fx.Node]) -> set[fx.Node]:
    """Nodes that weights alone decide."""
    fixed = {n for n in reached if n.op == "placeholder" and "weight" in n.meta}
    for node in nodes:
        sources = [instead[node]] if node in instead else node.all_input_nodes
        if sources and all(source in fixed for source in sources):
            fixed.add(node)
    return fixed


def _last_uses(nodes: list[fx.Node], kept: set[fx.Node], fixed: set[fx.Node]) -> dict[fx.Node, list[fx.Node]]:
    """Node → the values that nothing in the slice reads after it."""
    seen = kept | fixed
    table: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(nodes):
        if node in fixed:
            continue
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                table.setdefault(node, []).append(source)
    return table
