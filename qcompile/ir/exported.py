"""To and from `torch.export` programs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._ops import HigherOrderOperator, OpOverload
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    OutputSpec,
    TensorArgument,
)
from torch.utils import _pytree as pytree

from qcompile.errors import CaptureError
from qcompile.ir.program import Program, identifier, new_fake_mode
from qcompile.ir.types import dim_expr
from qcompile.ir.weights import MemorySource, WeightStore

aten = torch.ops.aten

# Left out of the IR: guards that a captured program has passed already.
_ASSERTS = {
    "aten::_assert_tensor_metadata",
    "aten::_assert_scalar",
    "aten::_assert_async",
    "aten::sym_constrain_range",
    "aten::sym_constrain_range_for_size",
}
# Identities in a functional graph.
_IDENTITIES = {"aten::lift_fresh_copy", "aten::lift_fresh", "aten::detach", "aten::detach_", "aten::alias"}
_CASTS = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.to.other,
    aten._to_copy.default,
    aten.type_as.default,
}


def from_exported(
    exported: ExportedProgram,
    weights: WeightStore | None = None,
    strip: str = "",
    input_names: Sequence[str] | None = None,
    output_names: Sequence[str] | None = None,
) -> Program:
    """Take an exported program as a `Program`; the exported program itself is left as it is.

    Args:
        exported: any program of `torch.export`; in-place operators and higher-order ones are functionalised first.
        weights: where its weights are read, under their fully-qualified names; the program's own tensors if None.
        strip: a prefix of module and weight names to leave out.
        input_names: names of the inputs, in order; those of the exported program if None.
        output_names: names of the outputs, in order; derived from the output's pytree if None.

    Raises:
        CaptureError: the program mutates a buffer or an input, or lacks a weight's value.
    """
    if _needs_functionalising(exported):
        exported = exported.run_decompositions({})
    for spec in exported.graph_signature.output_specs:
        if spec.kind is not OutputKind.USER_OUTPUT:
            raise CaptureError(
                f"the exported program changes {spec.target!r} ({spec.kind.name.lower()}): state must be inputs and "
                "outputs; export the model in eval mode with its cache passed in"
            )
    return _Importer(exported, weights, strip, input_names).run(output_names)


class _Importer:
    def __init__(
        self, exported: ExportedProgram, weights: WeightStore | None, strip: str, input_names: Sequence[str] | None
    ) -> None:
        self.exported, self.strip = exported, strip
        self.input_names = iter(input_names) if input_names is not None else None
        self.specs = {s.arg.name: s for s in exported.graph_signature.input_specs}
        self.tensors = _tensors(exported)
        self.weights = weights if weights is not None else WeightStore()
        self.graph = fx.Graph()
        self.table: dict[fx.Node, Any] = {}
        mode = next(
            (n.meta["val"].fake_mode for n in exported.graph.nodes if isinstance(n.meta.get("val"), FakeTensor)), None
        )
        self.mode = mode or new_fake_mode()

    def run(self, output_names: Sequence[str] | None) -> Program:
        self._weights()
        for node in self.exported.graph.nodes:
            if node.op == "placeholder" and self.specs[node.name].kind is InputKind.USER_INPUT:
                self._input(node)
            elif node.op == "call_function":
                self._call(node)
            elif node.op == "output":
                returned = tuple(fx.map_arg(list(node.args[0]), lambda n: self.table[n]))
                self.graph.output(returned).meta["module"] = ""
        names = output_names or _output_names(self.exported, len(returned))
        program = Program(self.graph, self.weights, names, self.mode, _symbols(self.graph))
        spec = self.exported.module_call_graph[0].signature
        if spec is not None:
            program.calling_convention = (spec.in_spec, spec.out_spec)
        program.refresh()
        program.verify()
        return program

    def _name(self, target: str) -> str:
        return target.removeprefix(self.strip)

    def _weights(self) -> None:
        """Placeholders of the weights that something reads; tied ones, which are one tensor, become one."""
        seen: dict[int, fx.Node] = {}
        for node in self.exported.graph.find_nodes(op="placeholder"):
            spec = self.specs[node.name]
            if spec.kind is InputKind.USER_INPUT or not node.users:
                continue
            if spec.kind not in (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR):
                raise CaptureError(
                    f"the exported program takes {spec.target!r}, a {spec.kind.name.lower()}: unsupported"
                )
            assert spec.target is not None
            tensor, key = self.tensors.get(spec.target), self._name(spec.target)
            if tensor is not None and id(tensor) in seen:
                self.table[node] = seen[id(tensor)]
                continue
            if key not in self.weights:
                if tensor is None or isinstance(tensor, FakeTensor):
                    raise CaptureError(f"the exported program has no value for {spec.target!r}; give it in weights=")
                self.weights.bind(key, MemorySource(tensor.detach()))
            name = identifier(key)
            self.table[node] = new = self.graph.create_node("placeholder", name, name=name)
            new.meta.update(weight=key, module=key.rpartition(".")[0], val=_fake(self.mode, node.meta["val"]))
            if tensor is not None:
                seen[id(tensor)] = new

    def _input(self, node: fx.Node) -> None:
        name = node.name if self.input_names is None else next(self.input_names)
        self.table[node] = new = self.graph.create_node("placeholder", name, name=name)
        new.meta.update(module="", val=node.meta["val"])

    def _call(self, node: fx.Node) -> None:
        target = node.target
        if isinstance(target, HigherOrderOperator):
            raise CaptureError(
                f"{node.format_node()}: higher-order operator {target} is not supported; export without it"
            )
        if isinstance(target, OpOverload) and (name := target._schema.name) in _ASSERTS | _IDENTITIES:
            if name in _IDENTITIES:
                self.table[node] = self.table[node.args[0]]  # type: ignore[index]
            return
        if target in _CASTS:
            self._cast(node)
            return
        args = fx.map_arg(node.args, lambda n: self.table[n])
        kwargs = fx.map_arg(dict(node.kwargs), lambda n: self.table[n])
        self._create(node, target, args, kwargs)

    def _cast(self, node: fx.Node) -> None:
        """All spellings of a cast become ``aten.to.dtype``; a cast to the dtype a tensor has is dropped. One that asks
        for rows in memory keeps that wish, for a view may stand behind it."""
        source = node.args[0]
        assert isinstance(source, fx.Node)
        dtype = node.meta["val"].dtype
        self.table[node] = self.table[source]
        if source.meta["val"].dtype != dtype:
            self._create(node, aten.to.dtype, (self.table[source], dtype), {})
        if any(given is torch.contiguous_format for given in (*node.args, *node.kwargs.values())):
            self._create(node, aten.contiguous.default, (self.table[node],), {})

    def _create(self, node: fx.Node, target: Any, args: Any, kwargs: Any) -> None:
        if not node.users and not (isinstance(target, OpOverload) and target._schema.is_mutable):
            return
        self.table[node] = new = self.graph.create_node("call_function", target, args, kwargs, name=node.name)
        new.meta.update(val=node.meta["val"], module=(_module(node) + ".").removeprefix(self.strip).rstrip("."))


def to_exported(program: Program, fake: bool = False) -> ExportedProgram:
    """The program as a `torch.export` program, weights as parameters (floating point) and buffers (codes).

    Args:
        fake: give fake weights, so that nothing is read (for lowerings that bind weights themselves).
    """
    from torch._export.verifier import load_verifier

    graph, table, inputs = fx.Graph(), dict[fx.Node, fx.Node](), list[InputSpec]()
    state: dict[str, Tensor] = {}
    for node in program.graph.nodes:
        table[node] = graph.node_copy(node, lambda n: table[n])
        table[node].meta = {"val": node.meta["val"]} if "val" in node.meta else {}
        if module := program.module_of(node):
            table[node].meta["nn_module_stack"] = {module: (module, "torch.nn.Module")}
        if node.op != "placeholder":
            continue
        argument = TensorArgument(name=node.name)
        if "weight" not in node.meta:
            inputs.append(InputSpec(InputKind.USER_INPUT, argument, target=None))
            continue
        key = program.key(node)
        tensor = node.meta["val"] if fake else program.weights[key]
        if node.meta["val"].dtype.is_floating_point:
            inputs.append(InputSpec(InputKind.PARAMETER, argument, target=key))
            state[key] = torch.nn.Parameter(tensor, requires_grad=False)
        else:
            inputs.append(InputSpec(InputKind.BUFFER, argument, target=key, persistent=True))
            state[key] = tensor
    kinds = {InputKind.PARAMETER: 0, InputKind.BUFFER: 1, InputKind.USER_INPUT: 2}
    inputs.sort(key=lambda spec: kinds[spec.kind])  # the order torch.export lifts them in
    _reorder(graph, [spec.arg.name for spec in inputs])
    returned = graph.output_node().args[0]
    outputs = [
        OutputSpec(OutputKind.USER_OUTPUT, TensorArgument(name=n.name), target=None)
        for n in returned  # type: ignore[union-attr]
        if isinstance(n, fx.Node)
    ]
    return ExportedProgram(
        root=torch.nn.Module(),
        graph=graph,
        graph_signature=ExportGraphSignature(inputs, outputs),
        state_dict=state,
        range_constraints=_ranges(program),
        module_call_graph=[_call_entry(program)],
        verifiers=[load_verifier("TRAINING")],
    )


def _reorder(graph: fx.Graph, names: list[str]) -> None:
    nodes = {n.name: n for n in graph.find_nodes(op="placeholder")}
    first = next(n for n in graph.nodes if n.op != "placeholder")
    for name in names:
        first.prepend(nodes[name])


def _call_entry(program: Program) -> Any:
    from torch.export.exported_program import ModuleCallEntry, ModuleCallSignature

    if program.calling_convention is not None:
        in_spec, out_spec = program.calling_convention
    else:
        in_spec = pytree.tree_structure((tuple(n.name for n in program.inputs), {}))
        out_spec = pytree.tree_structure(tuple(program.output_names))
    inputs: Any = [TensorArgument(name=n.name) for n in program.inputs]
    outputs: Any = [TensorArgument(name=n.name) for n in program.outputs.values() if isinstance(n, fx.Node)]
    return ModuleCallEntry("", ModuleCallSignature(inputs, outputs, in_spec, out_spec))


def _ranges(program: Program) -> dict[sympy.Symbol, Any]:
    """Ranges of the symbols in input shapes, from the shape environment that made them."""
    shape_env = program.fake_mode.shape_env
    found: dict[sympy.Symbol, Any] = {}
    for node in program.inputs:
        for size in node.meta["val"].shape:
            if not isinstance(size, int) and shape_env is not None:
                for symbol in size.node.expr.free_symbols:
                    if symbol in shape_env.var_to_range:
                        found[symbol] = shape_env.var_to_range[symbol]
    return found


def _module(node: fx.Node) -> str:
    """Fully-qualified name of the innermost module; torch's placeholder for "unknown" counts as none."""
    stack = [str(path) for path, _ in node.meta.get("nn_module_stack", {}).values()]
    return stack[-1] if stack and not stack[-1].startswith("_empty_nn_module_stack") else ""


def _needs_functionalising(exported: ExportedProgram) -> bool:
    for node in exported.graph.nodes:
        if node.op != "call_function":
            continue
        if isinstance(node.target, HigherOrderOperator):
            return True
        schema = node.target._schema if isinstance(node.target, OpOverload) else None
        if schema is not None and schema.is_mutable and schema.name not in _IDENTITIES:
            return True
    return False


def _tensors(exported: ExportedProgram) -> dict[str, Tensor]:
    tensors: Mapping[str, Any] = {**exported.state_dict, **exported.constants}
    return {key: value for key, value in tensors.items() if isinstance(value, Tensor)}


def _fake(mode: Any, value: Tensor) -> Tensor:
    with mode:
        return torch.empty(value.shape, dtype=value.dtype)


def _symbols(graph: fx.Graph) -> dict[sympy.Symbol, str]:
    """Public names of dynamic sizes, taken from the inputs they first appear in."""
    known = {("input_ids", 0): "batch", ("input_ids", 1): "sequence"}
    symbols: dict[sympy.Symbol, str] = {}
    for node in graph.find_nodes(op="placeholder"):
        if "weight" in node.meta or not isinstance(node.meta["val"], Tensor):
            continue
        for axis, size in enumerate(node.meta["val"].shape):
            expr = dim_expr(size)
            if isinstance(expr, sympy.Symbol) and expr not in symbols:
                past = node.name.startswith("past_key_values_") and axis == 2
                symbols[expr] = "past" if past else known.get((node.name, axis), f"{node.name}_{axis}")
    return symbols


def _output_names(exported: ExportedProgram, count: int) -> list[str]:
    """Names from the output's pytree: keys of dicts and dataclasses, else output_0, output_1, …"""
    spec = exported.module_call_graph[0].signature
    if spec is None:
        return [f"output_{i}" for i in range(count)]
    paths = [path for path, _ in pytree.tree_flatten_with_path(pytree.tree_unflatten([0] * count, spec.out_spec))[0]]
    if len(paths) == 1 and not paths[0]:
        return ["output"]
    plain = ["_".join(str(getattr(k, "key", getattr(k, "idx", getattr(k, "name", k)))) for k in path) for path in paths]
    return [identifier(name) if not name[:1].isdigit() else f"output_{name}" for name in plain]
