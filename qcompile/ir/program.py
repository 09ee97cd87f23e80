"""`Program`: one functional ATen graph plus its named weights."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.export import ExportedProgram
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from qcompile.errors import VerifyError
from qcompile.ir.edits import WeightEdit
from qcompile.ir.types import type_of
from qcompile.ir.weights import TensorSource, WeightStore

Argument = Any
"""What a node takes as an argument: a node, a literal, or a list of those (fx's own type is as wide)."""


class Program:
    """A captured model: `graph` holds the computation, `weights` the tensors it reads.

    The graph has weight placeholders first (``node.meta["weight"]`` is the key in the store), then the inputs, then
    calls, then one output that returns a flat tuple named by `output_names`. Every node carries ``meta["val"]`` (its
    fake value: shape and dtype, symbolic where dynamic) and ``meta["module"]`` (the module it was traced from).
    """

    def __init__(
        self,
        graph: fx.Graph,
        weights: WeightStore,
        output_names: Sequence[str],
        fake_mode: FakeTensorMode,
        symbols: Mapping[sympy.Symbol, str] | None = None,
    ) -> None:
        self.graph, self.weights = graph, weights
        self.output_names = tuple(output_names)
        self.fake_mode = fake_mode
        self.symbols = dict(symbols or {})
        self.calling_convention: tuple[Any, Any] | None = None  # pytree (in_spec, out_spec) of an exported program
        self.info: dict[str, Any] = {}  # where it came from: model type, directory, tokenizer

    # ------------------------------------------------------------------ looking

    @property
    def placeholders(self) -> list[fx.Node]:
        """Weights, then inputs."""
        return list(self.graph.find_nodes(op="placeholder"))

    @property
    def weight_nodes(self) -> list[fx.Node]:
        """Placeholders of weights, in graph order."""
        return [n for n in self.placeholders if "weight" in n.meta]

    @property
    def inputs(self) -> list[fx.Node]:
        """Placeholders that the caller feeds, in order."""
        return [n for n in self.placeholders if "weight" not in n.meta]

    @property
    def output_node(self) -> fx.Node:
        """The one node that returns."""
        return self.graph.output_node()

    @property
    def outputs(self) -> dict[str, Argument]:
        """Output name → the node (or literal) returned under it."""
        return dict(zip(self.output_names, self.output_node.args[0], strict=True))  # type: ignore[arg-type]

    @property
    def nodes(self) -> list[fx.Node]:
        """All calls, in program order; a list, so it is safe to edit the graph while walking it."""
        return [n for n in self.graph.nodes if n.op == "call_function"]

    def calls(self, *targets: Callable[..., Any]) -> list[fx.Node]:
        """Calls of any of `targets`, in program order; safe to edit the graph while walking it."""
        if len(targets) == 1:
            return list(self.graph.find_nodes(op="call_function", target=targets[0]))
        return [n for n in self.nodes if n.target in targets]

    def is_weight(self, value: Argument) -> bool:
        """Whether an argument is a weight placeholder."""
        return isinstance(value, fx.Node) and "weight" in value.meta

    def key(self, node: fx.Node) -> str:
        """The name of a weight placeholder in the store."""
        return str(node.meta["weight"])

    def weight(self, node: fx.Node) -> Tensor:
        """Read the tensor behind a weight placeholder."""
        return self.weights[self.key(node)]

    def weight_node(self, key: str) -> fx.Node | None:
        """The placeholder that reads `key`, or None."""
        return next((n for n in self.weight_nodes if n.meta["weight"] == key), None)

    def module_of(self, node: fx.Node) -> str:
        """Fully-qualified name of the module the node was traced from ("" where there is none)."""
        return str(node.meta.get("module", ""))

    def value(self, node: fx.Node) -> Any:
        """The node's fake value: a `FakeTensor`, a symbolic scalar, or a tuple of those."""
        return node.meta["val"]

    def type_of(self, node: fx.Node) -> str:
        """The node's type as the IR prints it, e.g. ``f32[batch, sequence, 64]``."""
        return type_of(node.meta["val"], self.symbols)

    def arg(self, node: fx.Node, name: str) -> Argument:
        """The argument called `name` in the operator's schema; its default where it is not given.

        Raises KeyError where the operator has no argument of that name.
        """
        index, default = _parameter(node, name)
        if index < len(node.args):
            return node.args[index]
        return node.kwargs.get(name, default)

    # ------------------------------------------------------------------ editing

    def set_arg(self, node: fx.Node, name: str, value: Argument) -> None:
        """Set the argument called `name` in the operator's schema."""
        index, _ = _parameter(node, name)
        if index < len(node.args):
            node.update_arg(index, value)
        else:
            node.update_kwarg(name, value)

    def set_weight(self, node: fx.Node, tensor: Tensor) -> None:
        """Replace the tensor behind a weight placeholder; every reader sees it."""
        self.weights[self.key(node)] = tensor
        node.meta["val"] = self.fake(tensor.shape, tensor.dtype)

    def edit_weight(self, node: fx.Node, edit: WeightEdit) -> None:
        """Record an edit of the weight behind a placeholder; every reader sees it. See `WeightStore.transform`."""
        key = self.key(node)
        self.weights.transform(key, edit)
        node.meta["val"] = self.fake(*self.weights.meta(key))

    def add_weight(self, key: str, tensor: Tensor | TensorSource, module: str = "") -> fx.Node:
        """Add a weight under a new key and return its placeholder. Raises KeyError if the key is taken."""
        if key in self.weights:
            raise KeyError(f"weight {key!r} exists already")
        if isinstance(tensor, Tensor):
            self.weights[key] = tensor
        else:
            self.weights.bind(key, tensor)
        return self._add_placeholder(key, module)

    def copy_weight(self, node: fx.Node, key: str) -> fx.Node:
        """Add a weight under a new key that holds what another holds now; from here on each goes its own way."""
        if key in self.weights:
            raise KeyError(f"weight {key!r} exists already")
        self.weights.alias(key, self.key(node))
        return self._add_placeholder(key, self.module_of(node))

    def _add_placeholder(self, key: str, module: str) -> fx.Node:
        shape, dtype = self.weights.meta(key)
        anchor = self.weight_nodes[-1:]  # keep weights before inputs
        first = next(iter(self.graph.nodes))
        with self.graph.inserting_after(anchor[0]) if anchor else self.graph.inserting_before(first):
            node = self.graph.create_node("placeholder", identifier(key), name=identifier(key))
        node.meta.update(weight=key, module=module, val=self.fake(shape, dtype))
        return node

    def call(
        self,
        target: Callable[..., Any],
        args: tuple[Argument, ...] = (),
        kwargs: dict[str, Argument] | None = None,
        *,
        before: fx.Node | None = None,
        after: fx.Node | None = None,
        name: str | None = None,
        module: str | None = None,
    ) -> fx.Node:
        """Insert a call before or after a node; its value is inferred, its module is that node's unless given."""
        anchor = before or after
        if anchor is None:
            raise ValueError("call() needs a node to stand before or after")
        with self.graph.inserting_before(anchor) if before else self.graph.inserting_after(anchor):
            node = self.graph.create_node("call_function", target, args, kwargs or {}, name=name)
        node.meta["module"] = self.module_of(anchor) if module is None else module
        self.infer(node)
        return node

    def replace(self, old: fx.Node, new: fx.Node) -> None:
        """Let all readers of `old` read `new`, and erase `old`."""
        old.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
        self.graph.erase_node(old)

    def refresh(self) -> None:
        """Drop dead calls and unread weights, and infer the values that are missing."""
        for node in reversed(self.nodes):
            if not node.users and not _has_effect(node):
                self.graph.erase_node(node)
        for node in self.weight_nodes:
            if not node.users:
                del self.weights[self.key(node)]
                self.graph.erase_node(node)
        for node in self.nodes:
            if "val" not in node.meta:
                self.infer(node)

    def infer(self, node: fx.Node) -> None:
        """Compute the node's fake value from its arguments'."""

        def value(argument: fx.Node) -> Any:
            return argument.meta["val"]

        args, kwargs = fx.map_arg(node.args, value), fx.map_arg(node.kwargs, value)
        with self.fake_mode, enable_python_dispatcher(), torch.no_grad():  # the dispatcher knows symbolic sizes
            node.meta["val"] = node.target(*args, **kwargs)  # type: ignore[operator]

    def fake(self, shape: Iterable[Any], dtype: torch.dtype) -> Tensor:
        """A fake tensor of this program (no storage)."""
        with self.fake_mode:
            return torch.empty(tuple(shape), dtype=dtype)

    def clone(self) -> Program:
        """An independent copy; tensors are shared, edits are not."""
        graph, table = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in self.graph.nodes:
            table[node] = graph.node_copy(node, lambda n: table[n])
            table[node].meta = dict(node.meta)
        other = Program(graph, self.weights.copy(), self.output_names, self.fake_mode, self.symbols)
        other.calling_convention, other.info = self.calling_convention, copy.deepcopy(self.info)
        return other

    # ------------------------------------------------------------------ checking, running, converting

    def verify(self) -> None:
        """Raise `VerifyError` unless every rule of docs/ir.md holds."""
        from qcompile.ir.verify import verify

        verify(self)

    def run(self, feeds: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run with every input given by name; returns every output by name. Weights are read when touched."""
        from qcompile.ir.run import run

        return run(self, feeds)

    def __call__(self, *inputs: Tensor, **named: Tensor) -> Any:
        """Run; inputs by position or name. Mask, positions and an empty cache are filled in when not given.

        Returns the logits ``[batch, sequence, vocabulary]`` of a language model, the only output of any other
        program that has one, else the tuple of outputs.
        """
        from qcompile.ir.run import fill

        if len(inputs) > len(self.inputs):
            raise TypeError(f"{len(inputs)} inputs given, the program has {[n.name for n in self.inputs]}")
        given = {node.name: tensor for node, tensor in zip(self.inputs, inputs, strict=False)}
        outputs = self.run(fill(self, given | named))
        if "logits" in outputs:
            return outputs["logits"]
        values = tuple(outputs.values())
        return values[0] if len(values) == 1 else values

    def __str__(self) -> str:
        from qcompile.ir.text import print_program

        return print_program(self)

    @classmethod
    def parse(cls, text: str, weights: Mapping[str, Tensor] | None = None, seed: int = 0) -> Program:
        """Parse `str(program)`. Weights that `weights` does not give are drawn from `seed`.

        >>> text = "def main(x: f32[2, 3], *, w: f32[4, 3]):\\n    y = aten.linear.default(x, w)\\n    return {'y': y}"
        >>> print(Program.parse(text))
        def main(x: f32[2, 3], *, w: f32[4, 3]):
            y: f32[2, 4] = aten.linear.default(x, w)
            return {"y": y}
        """
        from qcompile.ir.parse import parse_program

        return parse_program(text, weights, seed)

    @classmethod
    def from_exported(cls, exported: ExportedProgram, weights: WeightStore | None = None) -> Program:
        """Take an exported program; see `qcompile.ir.exported.from_exported`."""
        from qcompile.ir.exported import from_exported

        return from_exported(exported, weights)

    def to_exported(self, fake: bool = False) -> ExportedProgram:
        """A `torch.export` program that runs; with `fake`, its weights are fake tensors and nothing is read."""
        from qcompile.ir.exported import to_exported

        return to_exported(self, fake)


def new_fake_mode() -> FakeTensorMode:
    """A fake mode with symbolic sizes, for a program built from scratch."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True)


def identifier(key: str) -> str:
    """A Python identifier for a dotted name."""
    cleaned = "".join(c if c.isalnum() else "_" for c in key)
    return cleaned if cleaned[:1].isalpha() or cleaned.startswith("_") else f"w_{cleaned}"


def _parameter(node: fx.Node, name: str) -> tuple[int, Argument]:
    """Position and default of a schema argument."""
    if not isinstance(node.target, OpOverload):
        raise VerifyError(f"{node.format_node()} has no schema to look up {name!r} in")
    for index, argument in enumerate(node.target._schema.arguments):
        if argument.name == name:
            return index, argument.default_value if argument.has_default_value() else None
    names = [a.name for a in node.target._schema.arguments]
    raise KeyError(f"{node.target} has no argument {name!r}; it has {names}")


def _has_effect(node: fx.Node) -> bool:
    return isinstance(node.target, OpOverload) and node.target._schema.is_mutable
