"""The operators of `ops` as functions on builtin tensors: linalg, which becomes loops over packed codes.

A quantized weight ``[…, K]`` lies in memory as ``[…, groups, K / groups]`` of i2, i4 or i8. Dequantizing it is an
elementwise linalg.generic in front of the product; the product sums over group and place in the group. The compiler
keeps the two in one loop, so that no unpacked weight is ever stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.backends.torch_mlir import ops, types
from qcompile.ir.program import Program

CONTAINER = "container"
"""Key in a weight placeholder's meta: (bits, shape) of the integers that its codes are stored in."""


@dataclass(frozen=True)
class Kernel:
    """A private function and what it is called with; `kinds` and `result` are builtin types."""

    name: str
    text: str
    operands: tuple[fx.Node, ...]
    kinds: tuple[str, ...]
    result: str


def storage_of(node: fx.Node) -> str:
    """The builtin type of a weight as it is stored."""
    value = node.meta["val"]
    if CONTAINER in node.meta:
        bits, shape = node.meta[CONTAINER]
        return types.builtin(shape, f"i{bits}")
    return types.builtin(value.shape, types.element(value.dtype))


def kernel_of(program: Program, node: fx.Node, fixed: types.Sizes) -> Kernel | None:
    """The kernel that a call of `ops` is; None for any other call."""
    build = _BUILDERS.get(node.target)
    if build is None:
        return None
    tensors = tuple(a for a in node.args if isinstance(a, fx.Node))
    kinds = tuple(storage_of(a) if program.is_weight(a) else _builtin_of(a, fixed) for a in tensors)
    result = _builtin_of(node, fixed)
    body = build(_Call(program, node, fixed, result))
    marks = [str(node.target).split(".")[1], *kinds, result, *_signs(node)]
    name = re.sub(r"[^a-z0-9]+", "_", "_".join(marks).replace("?", "d").replace("tensor", "")).strip("_")
    arguments = ", ".join(f"%a{i}: {kind}" for i, kind in enumerate(kinds))
    text = f"  util.func private @{name}({arguments}) -> {result} {{\n{body}\n    util.return %result : {result}\n  }}"
    return Kernel(name, text, tensors, kinds, result)


def _signs(node: fx.Node) -> list[str]:
    """What the types of the operands do not say: whether their codes have a sign, and which operands there are."""
    return ["u" if _unsigned(a) else "s" if isinstance(a, fx.Node) else str(a) for a in node.args]


def _unsigned(argument: Any) -> bool:
    return isinstance(argument, fx.Node) and argument.meta["val"].dtype == torch.uint8


def _builtin_of(node: fx.Node, fixed: types.Sizes) -> str:
    value = node.meta["val"]
    return types.builtin(types.sizes_of(value.shape, fixed), types.element(value.dtype))


@dataclass(frozen=True)
class _Call:
    """One call while its kernel is written; `names` numbers the operands as the function's arguments."""

    program: Program
    node: fx.Node
    fixed: types.Sizes
    result: str

    def arg(self, name: str) -> fx.Node | None:
        found: fx.Node | None = self.program.arg(self.node, name)
        return found

    def name(self, argument: fx.Node) -> str:
        tensors = [a for a in self.node.args if isinstance(a, fx.Node)]
        return f"%a{tensors.index(argument)}"

    def sizes(self, node: fx.Node) -> list[int | None]:
        return types.sizes_of(node.meta["val"].shape, self.fixed)

    def kind(self, node: fx.Node) -> str:
        return storage_of(node) if self.program.is_weight(node) else _builtin_of(node, self.fixed)


# ---------------------------------------------------------------- pieces


def _map(dims: Sequence[str], result: Sequence[str]) -> str:
    return f"affine_map<({', '.join(dims)}) -> ({', '.join(result)})>"


def _dims(name: str, kind: str, sizes: Sequence[int | None]) -> tuple[list[str], list[str]]:
    """Lines that read the sizes of a tensor that vary, and every size as a value or number."""
    lines, found = [], []
    for axis, size in enumerate(sizes):
        if size is None:
            at, dim = f"{name}_at{axis}", f"{name}_dim{axis}"
            lines += [f"    {at} = arith.constant {axis} : index", f"    {dim} = tensor.dim {name}, {at} : {kind}"]
            found.append(dim)
        else:
            found.append(str(size))
    return lines, found


def _empty(name: str, sizes: Sequence[str], element: str) -> tuple[str, str]:
    """The line that makes an empty tensor, and its type."""
    kind = types.builtin([None if s.startswith("%") else int(s) for s in sizes], element)
    return f"    {name} = tensor.empty({', '.join(s for s in sizes if s.startswith('%'))}) : {kind}", kind


def _generic(
    name: str,
    dims: Sequence[str],
    reduced: int,
    inputs: Sequence[tuple[str, str, Sequence[str]]],
    output: tuple[str, str, Sequence[str]],
    body: Sequence[str],
) -> str:
    """A linalg.generic; the last `reduced` of `dims` are summed over. Block arguments are %in0 …, %out."""
    maps = ", ".join(_map(dims, at) for *_, at in [*inputs, output])
    kinds = ['"parallel"'] * (len(dims) - reduced) + ['"reduction"'] * reduced
    read = ", ".join(n for n, *_ in inputs), ", ".join(k for _, k, _ in inputs)
    block = ", ".join(f"%in{i}: {_element(k)}" for i, (_, k, _) in enumerate(inputs))
    block += f"{', ' if block else ''}%out: {_element(output[1])}"
    ins = f" ins({read[0]} : {read[1]})" if inputs else ""
    head = f"    {name} = linalg.generic {{indexing_maps = [{maps}], iterator_types = [{', '.join(kinds)}]}}{ins}"
    lines = [f"{head} outs({output[0]} : {output[1]}) {{", f"    ^bb0({block}):", *(f"      {b}" for b in body)]
    return "\n".join([*lines, f"    }} -> {output[1]}"])


def _element(kind: str) -> str:
    return kind.removesuffix(">").rpartition("x")[2].removeprefix("tensor<")


def _number(name: str, value: str, kind: str, unsigned: bool) -> tuple[list[str], str]:
    """Lines that turn a number of any stored type into float32, and what it is called then."""
    if kind == "f32":
        return [], value
    if kind[0] in "bf":
        return [f"{name} = arith.extf {value} : {kind} to f32"], name
    extend, convert = ("extui", "uitofp") if unsigned else ("extsi", "sitofp")
    wide = f"{name}_wide = arith.{extend} {value} : {kind} to i32"
    return [wide, f"{name} = arith.{convert} {name}_wide : i32 to f32"], name


def _looked_up(name: str, value: str, kind: str, table: str, table_kind: str) -> tuple[list[str], str]:
    lines = [
        f"{name}_wide = arith.extui {value} : {kind} to i32",
        f"{name}_at = arith.index_cast {name}_wide : i32 to index",
        f"{name} = tensor.extract {table}[{name}_at] : {table_kind}",
    ]
    return lines, name


class _Weight:
    """The operands that a quantized weight is made of, and the arithmetic that gives its values."""

    def __init__(self, call: _Call) -> None:
        self.call = call
        codes, scale = call.arg("codes"), call.arg("scale")
        assert codes is not None
        assert scale is not None
        self.codes, self.scale = codes, scale
        self.zero, self.table, self.steps = (call.arg(name) for name in ("zero_point", "table", "steps"))
        self.sizes: list[int] = list(codes.meta[CONTAINER][1])

    @property
    def read(self) -> list[fx.Node]:
        """What is read at every element: codes, scale, zero-point."""
        return [self.codes, self.scale, *([self.zero] if self.zero is not None else [])]

    def body(self, values: Sequence[str]) -> list[str]:
        """Lines that compute %value from a code, a scale and a zero-point of these names."""
        lines, code = self._number("%code", values[0], self.codes, self.table)
        more, step = self._number("%step", values[1], self.scale, self.steps)
        lines += more
        if self.zero is not None:
            more, zero = self._number("%zero", values[2], self.zero, None)
            lines += [*more, f"%moved = arith.subf {code}, {zero} : f32"]
            code = "%moved"
        return [*lines, f"%value = arith.mulf {code}, {step} : f32"]

    def _number(self, name: str, value: str, node: fx.Node, table: fx.Node | None) -> tuple[list[str], str]:
        kind = _element(self.call.kind(node))
        if table is not None:
            return _looked_up(name, value, kind, self.call.name(table), self.call.kind(table))
        return _number(name, value, kind, _unsigned(node))


def _dequantized(weight: _Weight) -> tuple[list[str], str]:
    """Lines that make %values ``[…, groups, place]`` of a weight, and its type."""
    dims = [f"d{i}" for i in range(len(weight.sizes))]
    line, kind = _empty("%room", [str(s) for s in weight.sizes], "f32")
    call = weight.call
    inputs = [(call.name(n), call.kind(n), dims if n is weight.codes else dims[:-1]) for n in weight.read]
    body = [*weight.body([f"%in{i}" for i in range(len(inputs))]), "linalg.yield %value : f32"]
    return [line, _generic("%values", dims, 0, inputs, ("%room", kind, dims), body)], kind


# ---------------------------------------------------------------- the kernels


def device_promise(device: int) -> str:
    """The attribute that stands for a logical device until the compiler is told what it is."""
    return f'#hal.device.promise<@"__device_{device}">'


def _unpack(call: _Call) -> str:
    weight = _Weight(call)
    lines, kind = _dequantized(weight)
    last = len(weight.sizes) - 1
    folds = ", ".join([*(f"[{i}]" for i in range(last - 1)), f"[{last - 1}, {last}]"])
    return "\n".join([*lines, f"    %result = tensor.collapse_shape %values [{folds}] : {kind} into {call.result}"])


def _linear(call: _Call) -> str:
    x, weight = call.arg("x"), _Weight(call)
    assert x is not None
    sizes, kind = call.sizes(x), call.kind(x)
    outputs, groups, size = weight.sizes
    batch = [f"m{i}" for i in range(len(sizes) - 1)]
    lines, named = _dims(call.name(x), kind, sizes)
    made, values = _dequantized(weight)
    split, last = [*sizes[:-1], groups, size], len(sizes) - 1
    folds = ", ".join([*(f"[{i}]" for i in range(last)), f"[{last}, {last + 1}]"])
    shape = ", ".join([*named[:-1], str(groups), str(size)])
    to = types.builtin(split, "f32")
    lines += made
    lines.append(f"    %split = tensor.expand_shape {call.name(x)} [{folds}] output_shape [{shape}] : {kind} into {to}")
    lines += _filled([*named[:-1], str(outputs)], "f32")
    dims = [*batch, "n", "g", "k"]
    inputs = [("%split", to, [*batch, "g", "k"]), ("%values", values, ["n", "g", "k"])]
    body = ["%each = arith.mulf %in0, %in1 : f32", "%sum = arith.addf %each, %out : f32", "linalg.yield %sum : f32"]
    lines.append(_generic("%result", dims, 2, inputs, ("%zeros", call.result, [*batch, "n"]), body))
    return "\n".join(lines)


def _filled(sizes: Sequence[str], element: str) -> list[str]:
    """Lines that make %zeros."""
    line, kind = _empty("%sums", sizes, element)
    zero = "0.0" if element[0] == "f" else "0"
    return [
        line,
        f"    %nought = arith.constant {zero} : {element}",
        f"    %zeros = linalg.fill ins(%nought : {element}) outs(%sums : {kind}) -> {kind}",
    ]


def _rows(call: _Call) -> str:
    index, weight = call.arg("index"), _Weight(call)
    assert index is not None
    lines, named = _dims(call.name(index), call.kind(index), call.sizes(index))
    *inner, groups, size = weight.sizes[1:]
    sizes = [*named, *(str(s) for s in (*inner, groups, size))]
    line, kind = _empty("%room", sizes, "f32")
    picks = [f"i{i}" for i in range(len(named))]
    dims = [*picks, *(f"d{i}" for i in range(len(inner) + 2))]
    body = [f"%at{i} = linalg.index {i} : index" for i in range(len(picks), len(dims))]
    body.insert(0, "%row = arith.index_cast %in0 : i64 to index")
    places = ["%row", *(f"%at{i}" for i in range(len(picks), len(dims)))]
    for i, node in enumerate(weight.read):
        at = places if node is weight.codes else places[:-1]
        body.append(f"%read{i} = tensor.extract {call.name(node)}[{', '.join(at)}] : {call.kind(node)}")
    body += [*weight.body([f"%read{i}" for i in range(len(weight.read))]), "linalg.yield %value : f32"]
    source = [(call.name(index), call.kind(index), picks)]
    lines += [line, _generic("%values", dims, 0, source, ("%room", kind, dims), body)]
    last = len(dims) - 1
    folds = ", ".join([*(f"[{i}]" for i in range(last - 1)), f"[{last - 1}, {last}]"])
    lines.append(f"    %result = tensor.collapse_shape %values [{folds}] : {kind} into {call.result}")
    return "\n".join(lines)


def _integer_linear(call: _Call) -> str:
    x, codes = call.arg("x"), call.arg("codes")
    assert x is not None
    assert codes is not None
    sizes, kind = call.sizes(x), call.kind(x)
    batch = [f"m{i}" for i in range(len(sizes) - 1)]
    outputs, _, inputs = codes.meta[CONTAINER][1]
    flat = types.builtin([outputs, inputs], _element(call.kind(codes)))
    lines, named = _dims(call.name(x), kind, sizes)
    lines.append(f"    %flat = tensor.collapse_shape {call.name(codes)} [[0, 1], [2]] : {call.kind(codes)} into {flat}")
    lines += _filled([*named[:-1], str(outputs)], "i32")
    extend = ["arith.extui" if _unsigned(node) else "arith.extsi" for node in (x, codes)]
    body = [
        f"%left = {extend[0]} %in0 : {_element(kind)} to i32",
        f"%right = {extend[1]} %in1 : {_element(flat)} to i32",
        "%each = arith.muli %left, %right : i32",
        "%sum = arith.addi %each, %out : i32",
        "linalg.yield %sum : i32",
    ]
    read = [(call.name(x), kind, [*batch, "k"]), ("%flat", flat, ["n", "k"])]
    lines.append(_generic("%result", [*batch, "n", "k"], 1, read, ("%zeros", call.result, [*batch, "n"]), body))
    return "\n".join(lines)


def _transfer(call: _Call) -> str:
    x = call.arg("x")
    assert x is not None
    kind = call.kind(x)
    lines, named = _dims(call.name(x), kind, call.sizes(x))
    varying = [d for d in named if d.startswith("%")]
    sizes = f"{{{', '.join(varying)}}}" if varying else ""
    promise = device_promise(call.program.arg(call.node, "device"))
    return "\n".join([*lines, f"    %result = flow.tensor.transfer {call.name(x)} : {kind}{sizes} to {promise}"])


_BUILDERS: dict[Any, Callable[[_Call], str]] = {
    ops.UNPACK: _unpack,
    ops.LINEAR: _linear,
    ops.ROWS: _rows,
    ops.INTEGER_LINEAR: _integer_linear,
    ops.TRANSFER: _transfer,
}
