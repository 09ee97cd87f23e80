"""A program as MLIR text: functions in the torch dialect, weights as named parameters, kernels beside them.

    y = aten.linear.default(x, w)    ⟶    %3 = "torch.aten.linear"(%1, %2, %none) : (…) -> !torch.vtensor<[?,64],f32>

Operators are written in MLIR's generic form, arguments in the order of their schema: whatever the torch dialect knows
needs no line here. Each carries the name of its node and module as its location, so that a compiler's complaint can be
read back.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.backends.torch_mlir import types
from qcompile.backends.torch_mlir.brevitas import MATMUL, OPERATOR
from qcompile.backends.torch_mlir.kernels import Kernel, device_promise, kernel_of, storage_of
from qcompile.errors import LoweringError
from qcompile.ir.program import Program

aten = torch.ops.aten

_ON_INTEGERS: dict[Any, str] = {
    operator.add: "torch.aten.add.int",
    operator.sub: "torch.aten.sub.int",
    operator.mul: "torch.aten.mul.int",
    operator.floordiv: "torch.aten.floordiv.int",
    operator.mod: "torch.aten.remainder.int",
    operator.neg: "torch.aten.neg.int",
    torch.sym_max: "torch.prim.max.int",
    torch.sym_min: "torch.prim.min.int",
}
_OTHER_NAMES = {"torch.aten.__and__": "torch.aten.bitwise_and", "torch.aten.__or__": "torch.aten.bitwise_or"}
_LISTS = {
    "int": "!torch.list<int>",
    "SymInt": "!torch.list<int>",
    "float": "!torch.list<float>",
    "bool": "!torch.list<bool>",
    "Tensor": "!torch.list<vtensor>",
    "Optional[Tensor]": "!torch.list<optional<vtensor>>",
}


@dataclass(frozen=True)
class Value:
    """An SSA value and its type."""

    name: str
    kind: str


@dataclass(frozen=True)
class Entry:
    """A function of the module; `fixed` gives sizes to symbols of the program."""

    name: str
    fixed: types.Sizes = field(default_factory=dict)


@dataclass(frozen=True)
class Naming:
    """How weights are called: scope and key in the parameter files, symbol in the module; and on which device."""

    scope: Callable[[fx.Node], str]
    key: Callable[[fx.Node], str]
    symbol: Callable[[fx.Node], str]
    device: Callable[[fx.Node], int | None] = lambda node: None


def operator_name(target: Any) -> str:
    """The torch dialect's name of what a node calls: ``torch.aten.add.Tensor``; a default overload goes unnamed.

    Raises LoweringError for what is no operator.
    """
    if target in _ON_INTEGERS:
        return _ON_INTEGERS[target]
    if target is aten.sym_size.int:
        return "torch.aten.size.int"
    if not isinstance(target, OpOverload):
        raise LoweringError(f"{target} is no operator of the torch dialect; rewrite it in a pass")
    name = f"torch.{str(target).removesuffix('.default')}"
    for old, new in _OTHER_NAMES.items():
        if name.startswith(f"{old}."):
            return name.replace(old, new, 1)
    return name


def emit_torch(program: Program, entry: Entry, naming: Naming, name: str) -> str:
    """A module of the torch dialect alone: weights are arguments of the function, behind the inputs."""
    return f"module @{name} {{\n{_Function(program, entry, naming, True).text(weights=True)}\n}}\n"


def emit_module(program: Program, entries: Sequence[Entry], naming: Naming, name: str, locations: bool = True) -> str:
    """The module's text: globals, kernels, and one function an entry."""
    functions = [_Function(program, entry, naming, locations) for entry in entries]
    bodies = [function.text() for function in functions]
    kernels = {k.name: k for function in functions for k in function.kernels.values()}
    lines = [f"module @{name} {{"]
    lines += [_global(program, node, naming) for node in program.weight_nodes]
    lines += [kernels[k].text for k in sorted(kernels)]
    return "\n".join([*lines, *bodies, "}", ""])


def _global(program: Program, node: fx.Node, naming: Naming) -> str:
    device = naming.device(node)
    place = "" if device is None else f" {{stream.affinity = {device_promise(device)}}}"
    named = f'#flow.parameter.named<"{naming.scope(node)}"::"{naming.key(node)}">'
    return f"  util.global private @{naming.symbol(node)}{place} = {named} : {storage_of(node)}"


class _Function:
    """One function while it is written."""

    def __init__(self, program: Program, entry: Entry, naming: Naming, locations: bool) -> None:
        self.program, self.entry, self.naming, self.locations = program, entry, naming, locations
        self.lines: list[str] = []
        self.values: dict[fx.Node, Any] = {}
        self.kernels: dict[str, Kernel] = {}
        self._count = 0
        self._here = ""

    def text(self, weights: bool = False) -> str:
        """The function; with `weights`, they are arguments of it."""
        arguments = []
        for i, node in enumerate([*self.program.inputs, *(self.program.weight_nodes if weights else ())]):
            self.values[node] = Value(f"%arg{i}", self._kind(node.meta["val"]))
            arguments.append(f"%arg{i}: {self.values[node].kind}")
        for node in self.program.nodes:
            self._at(node)
            self.values[node] = self._node(node)
        results = [self._value(node) for node in self.program.outputs.values()]
        kinds = ", ".join(r.kind for r in results)
        head = f"  func.func @{self.entry.name}({', '.join(arguments)}) -> ({kinds}) {{"
        tail = f"    return {', '.join(r.name for r in results)} : {kinds}"
        return "\n".join([head, *self.lines, tail, "  }"])

    # ---------------------------------------------------------------- nodes

    def _node(self, node: fx.Node) -> Any:
        target, value = node.target, node.meta["val"]
        if target is operator.getitem:
            return self.values[node.args[0]][node.args[1]]  # type: ignore[index]
        if (kernel := kernel_of(self.program, node, self.entry.fixed)) is not None:
            return self._kernel(node, kernel)
        if target in _ON_INTEGERS or target is aten.sym_size.int:
            return self._op(operator_name(target), [self._literal(a, "int") for a in node.args], ["!torch.int"])[0]
        assert isinstance(target, OpOverload)
        target = _scalar_overload(node, target)
        arguments = [self._argument(a, s.type) for a, s in _by_schema(node, target)]
        if target is MATMUL:
            return self._custom(OPERATOR, arguments, self._kind(value))
        name = operator_name(target)
        if isinstance(value, (tuple, list)):
            kinds = [self._kind(v) for v in value]
            if target._schema.returns[0].type.kind() != "ListType":
                return self._op(name, arguments, kinds)
            made = self._op(name, arguments, ["!torch.list<vtensor>"])
            return self._op("torch.prim.ListUnpack", made, kinds)
        return self._op(name, arguments, [self._kind(value)])[0]

    def _kernel(self, node: fx.Node, kernel: Kernel) -> Value:
        """A call of a function on builtin tensors."""
        self.kernels[kernel.name] = kernel
        operands = []
        for source, kind in zip(kernel.operands, kernel.kinds, strict=True):
            operands.append(self._weight(source) if self.program.is_weight(source) else self._builtin(source, kind))
        names, kinds = ", ".join(o.name for o in operands), ", ".join(o.kind for o in operands)
        made = self._fresh()
        self._line(f"{made} = util.call @{kernel.name}({names}) : ({kinds}) -> {kernel.result}")
        return self._torch(Value(made, kernel.result), node.meta["val"])

    def _builtin(self, node: fx.Node, kind: str) -> Value:
        value, made = self._value(node), self._fresh()
        self._line(f"{made} = torch_c.to_builtin_tensor {value.name} : {value.kind} -> {kind}")
        return Value(made, kind)

    def _torch(self, value: Value, like: Tensor) -> Value:
        made, kind = self._fresh(), self._kind(like)
        self._line(f"{made} = torch_c.from_builtin_tensor {value.name} : {value.kind} -> {kind}")
        return Value(made, kind)

    def _weight(self, node: fx.Node) -> Value:
        made, kind = self._fresh(), storage_of(node)
        self._line(f"{made} = util.global.load @{self.naming.symbol(node)} : {kind}")
        return Value(made, kind)

    def _value(self, node: Any) -> Value:
        if not isinstance(node, fx.Node):
            raise LoweringError(f"the program returns {node!r}, no tensor; leave it out of the outputs")
        if node not in self.values and self.program.is_weight(node):
            self.values[node] = self._torch(self._weight(node), node.meta["val"])
        found = self.values[node]
        assert isinstance(found, Value)
        return found

    # ---------------------------------------------------------------- arguments

    def _argument(self, value: Any, kind: Any) -> Value:
        if kind.kind() == "OptionalType" and value is not None:
            kind = kind.getElementType()
        if isinstance(value, (list, tuple)):
            inner = kind.getElementType()
            items = [self._argument(v, inner) for v in value]
            return self._op("torch.prim.ListConstruct", items, [_LISTS[str(inner)]])[0]
        return self._literal(value, str(kind))

    def _literal(self, value: Any, kind: str) -> Value:
        match value:
            case fx.Node():
                return self._value(value)
            case None:
                return self._constant("none")
            case bool():
                return self._constant("bool", "true" if value else "false")
            case int() if kind != "float":
                return self._constant("int", f"{value} : i64")
            case int() | float():
                return self._constant("float", f"{types.float_bits(float(value))} : f64")
            case str():
                return self._constant("str", f'"{value}"')
            case torch.dtype():
                return self._constant("int", f"{types.scalar_type(value)} : i64")
            case torch.layout():
                return self._constant("int", "0 : i64")
            case torch.memory_format():
                return self._constant("int", "0 : i64" if value is torch.contiguous_format else "1 : i64")
            case torch.device():
                return self._constant("device", f'"{value.type}"')
        raise LoweringError(f"an argument {value!r} of type {kind} has no form in the torch dialect")

    def _constant(self, kind: str, value: str | None = None) -> Value:
        named = "!torch.Device" if kind == "device" else f"!torch.{kind}"
        attributes = "" if value is None else f" {{value = {value}}}"
        return self._op(f"torch.constant.{kind}", [], [named], attributes)[0]

    # ---------------------------------------------------------------- lines

    def _op(self, name: str, operands: Sequence[Value], kinds: Sequence[str], attributes: str = "") -> list[Value]:
        results = [Value(self._fresh(), kind) for kind in kinds]
        names, taken = ", ".join(o.name for o in operands), ", ".join(o.kind for o in operands)
        given = ", ".join(kinds) if len(kinds) == 1 else f"({', '.join(kinds)})"
        self._line(f'{", ".join(r.name for r in results)} = "{name}"({names}){attributes} : ({taken}) -> {given}')
        return results

    def _custom(self, name: str, operands: Sequence[Value], kind: str) -> Value:
        """An operator that the torch dialect does not have itself."""
        made = self._fresh()
        names, taken = ", ".join(o.name for o in operands), ", ".join(o.kind for o in operands)
        self._line(f'{made} = torch.operator "{name}"({names}) : ({taken}) -> {kind}')
        return Value(made, kind)

    def _line(self, text: str) -> None:
        self.lines.append(f"    {text}{self._here}")

    def _fresh(self) -> str:
        self._count += 1
        return f"%{self._count - 1}"

    def _kind(self, value: Any) -> str:
        if isinstance(value, Tensor):
            return types.vtensor(value, self.entry.fixed)
        if isinstance(value, (int, torch.SymInt)) and not isinstance(value, bool):
            return "!torch.int"
        raise LoweringError(f"a value of type {type(value).__name__} has no form in the torch dialect")

    def _at(self, node: fx.Node) -> None:
        module = self.program.module_of(node)
        self._here = f' loc("{node.name} (module {module or "top"})")' if self.locations else ""


def _by_schema(node: fx.Node, target: OpOverload[Any, Any]) -> Iterator[tuple[Any, Any]]:
    """Each argument with its place in the schema, defaults filled in."""
    for i, argument in enumerate(target._schema.arguments):
        given = node.args[i] if i < len(node.args) else node.kwargs.get(argument.name, argument.default_value)
        yield given, argument


def _scalar_overload(node: fx.Node, target: OpOverload[Any, Any]) -> OpOverload[Any, Any]:
    """``add.Tensor(x, 2)`` is ``add.Scalar(x, 2)``: the torch dialect takes no number for a tensor."""
    schema = target._schema
    if target._overloadname != "Tensor" or len(node.args) < 2 or str(schema.arguments[1].type) != "Tensor":
        return target
    other = node.args[1]
    if isinstance(other, fx.Node) and isinstance(other.meta["val"], Tensor):
        return target
    packet: Mapping[str, Any] = {n: getattr(target.overloadpacket, n) for n in target.overloadpacket.overloads()}
    if "Scalar" not in packet:
        raise LoweringError(f"{node.name}: {target} of a tensor and a number has no form in the torch dialect")
    found: OpOverload[Any, Any] = packet["Scalar"]
    return found
