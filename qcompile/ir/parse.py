"""Parsing the IR text back into a program (grammar: docs/ir.md)."""

from __future__ import annotations

import ast
import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import Tensor, fx
from torch._dynamo.source import ConstantSource
from torch.fx.experimental.symbolic_shapes import DimDynamic, StatelessSymbolicContext

from qcompile.errors import VerifyError
from qcompile.ir.program import Program, new_fake_mode
from qcompile.ir.types import DTYPES
from qcompile.ir.weights import WeightStore

# Sizes that stand for a symbol while values are inferred: above 1 (0 and 1 specialise), primes that no axis is likely
# to have, and small, so that their sums stay inside a model's table of positions.
_HINTS = (11, 13, 17, 19, 23, 29, 31, 37, 41, 43, 47, 53, 59, 61, 67, 71)


def parse_program(text: str, weights: Mapping[str, Tensor] | None = None, seed: int = 0) -> Program:
    """Parse `text`; see `Program.parse`. Raises VerifyError naming the line that does not fit."""
    import qcompile.ops  # noqa: F401  registers the operators that the text may name

    try:
        module = ast.parse(text)
    except SyntaxError as error:
        raise VerifyError(f"IR text, line {error.lineno}: {error.msg}") from error
    if len(module.body) != 1 or not isinstance(function := module.body[0], ast.FunctionDef):
        raise VerifyError("IR text must be one function: def main(inputs, *, weights): …")
    reader = _Reader(text.split("\n"), weights, seed)
    reader.signature(function)
    for statement in function.body:
        try:
            reader.statement(statement)
        except VerifyError as error:
            raise VerifyError(f"IR text, line {statement.lineno}: {error}") from error
    if reader.program is None:
        raise VerifyError("IR text has no return statement")
    reader.program.verify()
    return reader.program


class _Reader:
    """State of one parse."""

    def __init__(self, lines: list[str], weights: Mapping[str, Tensor] | None, seed: int) -> None:
        self.lines, self.given = lines, weights
        self.random = torch.Generator().manual_seed(seed)
        self.graph = fx.Graph()
        self.store = weights if isinstance(weights, WeightStore) else WeightStore()  # a store is used, not copied
        self.building = Program(self.graph, self.store, (), new_fake_mode())
        self.names: dict[str, fx.Node] = {}
        self.symbols: dict[str, torch.SymInt] = {}
        self.program: Program | None = None

    # -------------------------------------------------------------- signature

    def signature(self, function: ast.FunctionDef) -> None:
        defaults = {a.arg: d for a, d in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True)}
        for argument in function.args.kwonlyargs:
            dtype, sizes = _tensor_type(argument.annotation)
            default = defaults[argument.arg]
            key = argument.arg if default is None else ast.literal_eval(default)
            shape = tuple(int(s) for s in sizes)
            node = self._placeholder(argument.arg)
            if self.store is not self.given:
                self.store[key] = self._tensor(key, shape, dtype)
            node.meta.update(weight=key, val=self.building.fake(shape, dtype))
        for argument in function.args.args:
            dtype, sizes = _tensor_type(argument.annotation)
            self._placeholder(argument.arg).meta["val"] = self._input(sizes, dtype)

    def _placeholder(self, name: str) -> fx.Node:
        self.names[name] = node = self.graph.create_node("placeholder", name, name=name)
        node.meta["module"] = ""
        return node

    def _tensor(self, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.given is not None and key in self.given:
            tensor = self.given[key]
            if tuple(tensor.shape) != shape or tensor.dtype != dtype:
                raise VerifyError(
                    f"weight {key!r} is {tensor.dtype}{list(tensor.shape)}, declared {dtype}{list(shape)}"
                )
            return tensor
        if dtype.is_floating_point and dtype.itemsize > 1:
            return torch.randn(shape, generator=self.random, dtype=torch.float32).to(dtype)
        low, high = (0, 2) if dtype in (torch.bool, torch.uint8) else (-2, 2)
        return torch.randint(low, high, shape, generator=self.random).to(dtype)

    def _input(self, sizes: list[str], dtype: torch.dtype) -> Tensor:
        """A fake tensor whose dynamic sizes are symbols, shared by name: equal names are one symbol."""
        shape: list[int | torch.SymInt] = []
        for size in sizes:
            names = sorted({n.id for n in ast.walk(ast.parse(size)) if isinstance(n, ast.Name)})
            for name in names:
                if name not in self.symbols:
                    self.symbols[name] = self._symbol(name)
            expr = sympy.sympify(size, locals={n: sympy.Symbol(n, integer=True) for n in names})
            shape.append(sympy.lambdify(names, expr)(*(self.symbols[n] for n in names)) if names else int(expr))
        return self.building.fake(shape, dtype)

    def _symbol(self, name: str) -> torch.SymInt:
        """A fresh dynamic size; its hint only steers inference and is distinct from the others'."""
        hint = _HINTS[len(self.symbols) % len(_HINTS)]
        context: Any = StatelessSymbolicContext(dynamic_sizes=[DimDynamic.DYNAMIC])
        fake = self.building.fake_mode.from_tensor(
            torch.empty(hint, dtype=torch.int8), symbolic_context=context, source=ConstantSource(name)
        )
        size = fake.shape[0]
        assert isinstance(size, torch.SymInt)
        self.building.symbols[size.node.expr] = name
        return size

    # -------------------------------------------------------------- statements

    def statement(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.Return):
            self._return(statement.value)
            return
        if not isinstance(statement, (ast.Assign, ast.AnnAssign)) or not isinstance(call := statement.value, ast.Call):
            raise VerifyError("expected NAME: TYPE = OPERATOR(…) or return {…}")
        target = statement.target if isinstance(statement, ast.AnnAssign) else statement.targets[0]
        name = ast.unparse(target)
        if name in self.names:
            raise VerifyError(f"{name} is assigned twice")
        args = tuple(self._operand(a) for a in call.args)
        kwargs = {k.arg: self._operand(k.value) for k in call.keywords if k.arg}
        node = self.graph.create_node("call_function", resolve(ast.unparse(call.func)), args, kwargs, name=name)
        node.meta["module"] = self._module(statement)
        self.building.infer(node)
        self.names[name] = node
        if isinstance(statement, ast.AnnAssign):
            self._compare(node, ast.unparse(statement.annotation))

    def _compare(self, node: fx.Node, declared: str) -> None:
        inferred = ast.unparse(ast.parse(self.building.type_of(node), mode="eval"))
        if "[" in declared and inferred.split("[")[0] != declared.split("[")[0]:
            raise VerifyError(f"{node.name} is declared {declared}, inferred {inferred}")
        fixed = (_static_sizes(declared), _static_sizes(inferred))
        if None not in fixed and fixed[0] != fixed[1]:
            raise VerifyError(f"{node.name} is declared {declared}, inferred {inferred}")

    def _module(self, statement: ast.stmt) -> str:
        """The comment at the end of the line names the module; ast drops comments, so look at the text."""
        tail = self.lines[(statement.end_lineno or statement.lineno) - 1].encode()[statement.end_col_offset or 0 :]
        return tail.decode().partition("#")[2].strip()

    def _return(self, value: ast.expr | None) -> None:
        if not isinstance(value, ast.Dict):
            raise VerifyError('expected return {"name": value, …}')
        names = [ast.literal_eval(k) for k in value.keys if k is not None]
        node = self.graph.output(tuple(self._operand(v) for v in value.values))
        node.meta["module"] = ""
        b = self.building
        self.program = Program(self.graph, self.store, names, b.fake_mode, b.symbols)

    def _operand(self, expr: ast.expr) -> Any:
        if isinstance(expr, ast.Name):
            if expr.id not in self.names:
                raise VerifyError(f"{expr.id} is not defined")
            return self.names[expr.id]
        if isinstance(expr, ast.List):
            return [self._operand(e) for e in expr.elts]
        if isinstance(expr, ast.Tuple):
            return tuple(self._operand(e) for e in expr.elts)
        if isinstance(expr, ast.Attribute):
            return _torch_constant(ast.unparse(expr))
        if isinstance(expr, ast.Call):
            inner = [self._operand(a) for a in expr.args]
            makers: dict[str, Callable[..., Any]] = {"float": float, "slice": slice, "torch.device": torch.device}
            if (name := ast.unparse(expr.func)) in makers:
                return makers[name](*inner)
        try:
            return ast.literal_eval(expr)
        except ValueError as error:
            raise VerifyError(f"{ast.unparse(expr)} is not an argument of the IR") from error


def resolve(name: str) -> Callable[..., Any]:
    """The operator that `name` spells; the inverse of `target_name`. Raises VerifyError for an unknown one."""
    parts = name.split(".")
    roots: dict[str, Any] = {"operator": operator, "math": math}
    if parts[0] in roots and len(parts) == 2 and hasattr(roots[parts[0]], parts[1]):
        return getattr(roots[parts[0]], parts[1])  # type: ignore[no-any-return]
    if parts[0] == "torch" and len(parts) == 2 and parts[1].startswith("sym_") and hasattr(torch, parts[1]):
        return getattr(torch, parts[1])  # type: ignore[no-any-return]
    try:
        found: Any = torch.ops
        for part in parts:
            found = getattr(found, part)
    except AttributeError as error:
        raise VerifyError(f"operator {name!r} is unknown") from error
    if not isinstance(found, torch._ops.OpOverload):
        raise VerifyError(f"{name!r} names no overload of an operator; write it like aten.linear.default")
    return found


def _torch_constant(name: str) -> Any:
    value = getattr(torch, name.removeprefix("torch."), None) if name.startswith("torch.") else None
    if not isinstance(value, (torch.dtype, torch.layout, torch.memory_format)):
        raise VerifyError(f"{name} is not a dtype, layout or memory format")
    return value


def _tensor_type(annotation: ast.expr | None) -> tuple[torch.dtype, list[str]]:
    if not isinstance(annotation, ast.Subscript) or (short := ast.unparse(annotation.value)) not in DTYPES:
        text = "nothing" if annotation is None else ast.unparse(annotation)
        raise VerifyError(f"expected a tensor type like f32[batch, 64], found {text}")
    sizes = annotation.slice.elts if isinstance(annotation.slice, ast.Tuple) else [annotation.slice]
    return DTYPES[short], [ast.unparse(s) for s in sizes]


def _static_sizes(text: str) -> list[str] | None:
    """Sizes that are plain integers, with None-like dots for symbolic ones; None where it is no tensor type."""
    expr = ast.parse(text, mode="eval").body
    if not isinstance(expr, ast.Subscript) or ast.unparse(expr.value) not in DTYPES:
        return None
    sizes = expr.slice.elts if isinstance(expr.slice, ast.Tuple) else [expr.slice]
    return [ast.unparse(s) if isinstance(s, ast.Constant) else "…" for s in sizes]
