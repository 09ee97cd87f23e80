"""`torch.compile(model, backend="qcompile", options={"recipe": …})`: the recipe's passes and the Triton lowering.

    torch.compile ── graph of torch calls ──▶ torch.export ──▶ Program ──▶ passes ──▶ operators on packed weights

Each graph that torch.compile captures is compiled on its own, for the shapes it was captured with (symbolic where those
are). Parameters are taken as they are when a graph is captured. On a GPU its quantized products are kernels that Triton
compiles just in time; on a CPU their references run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.errors import QCompileError
from qcompile.recipe import Recipe

DEFAULT_RECIPE = "int4-g128"
_OPTIONS = ("recipe", "overrides")


def qcompile_backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """The backend that `torch.compile` calls.

    Args:
        options: ``recipe``, as `qcompile.compile` takes it (preset, file, mapping or `Recipe`), and ``overrides``, a
        list
            like ``["weights.group=64"]``.

    Raises QCompileError for an unknown option; the first call raises whatever the recipe's passes raise.
    """
    recipe = _recipe(options or {})
    bound = _Bound(graph, example_inputs)
    if not bound.tensors:
        return graph.forward
    made: list[Callable[..., tuple[Any, ...]]] = []

    def call(*inputs: Any) -> tuple[Any, ...]:
        if not made:  # not while torch.compile traces: what export does would become guards of its graph
            made.append(_compiled(bound, [inputs[i] for i in bound.tensors], recipe))
        return made[0](*inputs)

    return call


def _recipe(options: Mapping[str, Any]) -> Recipe:
    for name in options:
        if name not in _OPTIONS:
            raise QCompileError(f"backend qcompile has no option {name!r}; use {' or '.join(_OPTIONS)}")
    return Recipe.load(options.get("recipe", DEFAULT_RECIPE)).override(list(options.get("overrides", ())))


class _Bound(torch.nn.Module):
    """The graph with its parameters in place, and sizes that are inputs of it read off the tensors: `forward` takes the
    tensors that come with each call."""

    def __init__(self, graph: fx.GraphModule, inputs: Sequence[Any]) -> None:
        super().__init__()
        self.graph_module, self.count = graph, len(inputs)
        self.names: dict[int, str] = {}
        self.sizes: dict[int, tuple[int, int]] = {}  # input that is a size → (tensor, axis)
        nodes = list(graph.graph.find_nodes(op="placeholder"))
        self.tensors = [
            i for i, v in enumerate(inputs) if isinstance(v, Tensor) and not isinstance(v, torch.nn.Parameter)
        ]
        self.fakes = [nodes[i].meta["example_value"] for i in self.tensors]
        for i, value in enumerate(inputs):
            if isinstance(value, torch.nn.Parameter):
                self.names[i] = _weight_name(nodes[i].name)
                self.register_parameter(self.names[i], value)
            elif i not in self.tensors:
                self.sizes[i] = self._place(nodes[i].meta["example_value"])

    def _place(self, size: Any) -> tuple[int, int]:
        """The tensor and axis that a symbolic size is read off."""
        for tensor, fake in enumerate(self.fakes):
            for axis, found in enumerate(fake.shape):
                if isinstance(found, torch.SymInt) and str(found) == str(size):
                    return tensor, axis
        raise QCompileError(f"the captured graph has an input {size!r} that is no size of a tensor; use dynamic=False")

    @property
    def dynamic_shapes(self) -> tuple[dict[int, Any], ...]:
        """The axes of each tensor that vary, as `torch.export` takes them."""
        dynamic = torch.export.Dim.DYNAMIC
        return tuple({a: dynamic for a, n in enumerate(f.shape) if isinstance(n, torch.SymInt)} for f in self.fakes)

    def forward(self, *tensors: Tensor) -> Any:
        given = dict(zip(self.tensors, tensors, strict=True))
        sizes = {i: tensors[tensor].shape[axis] for i, (tensor, axis) in self.sizes.items()}
        whole = [given[i] if i in given else sizes[i] if i in sizes else self._weight(i) for i in range(self.count)]
        return self.graph_module(*whole)

    def _weight(self, index: int) -> Tensor:
        weight: Tensor = getattr(self, self.names[index])
        return weight


def _weight_name(placeholder: str) -> str:
    """``L_self_modules_fc_parameters_weight_`` as ``fc_weight``."""
    name = placeholder.removeprefix("L_self_").removeprefix("l_self_").strip("_")
    return name.replace("modules_", "").replace("parameters_", "")


def _compiled(bound: _Bound, examples: Sequence[Tensor], recipe: Recipe) -> Callable[..., tuple[Any, ...]]:
    from qcompile.backends.triton.rewrite import rewrite
    from qcompile.driver import compile as compile_model
    from qcompile.ir.program import Program
    from qcompile.ir.run import run

    shapes = {"tensors": bound.dynamic_shapes}
    exported = torch.export.export(bound.eval(), tuple(examples), dynamic_shapes=shapes, strict=False)
    lowered = rewrite(compile_model(Program.from_exported(exported), recipe).program).program
    names, device = [node.name for node in lowered.inputs], examples[0].device
    for key in list(lowered.weights):
        lowered.weights[key] = lowered.weights[key].to(device)  # packed once, and held

    def call(*inputs: Any) -> tuple[Any, ...]:
        return tuple(run(lowered, {n: inputs[i] for n, i in zip(names, bound.tensors, strict=True)}).values())

    return call
