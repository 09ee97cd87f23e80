"""Tensor parallelism: a prelowered program in which ranks, each on a device of its own, share products.

    y = linear(act(linear(x, A)), B)

    x₀ = x                x₁ = transfer(x, 1)
    h₀ = linear(x₀, A₀)   h₁ = linear(x₁, A₁)          rows of A: each rank has some of the outputs
    y₀ = linear(h₀, B₀)   y₁ = linear(h₁, B₁)          columns of B: each rank has a part of every sum
    y = y₀ + transfer(y₁, 0)                           all-reduce

The residual stream and what is not shared stay on device 0. Exact but for the order of sums.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from functools import reduce
from typing import Any

import torch
from torch import Tensor, fx

from qcompile.backends.onnx_qcdq.rewriting import Derived
from qcompile.backends.torch_mlir import ops
from qcompile.backends.torch_mlir.kernels import CONTAINER
from qcompile.backends.torch_mlir.ranks import (
    COMBINED,
    SPLITTERS,
    Assignment,
    Product,
    assign,
    infer,
    piece_bounds,
    product_of,
)
from qcompile.backends.torch_mlir.split import Runs, Split, Splits, sizes, slice_bounds, tensors
from qcompile.backends.torch_mlir.weights import DEVICE, SLICED
from qcompile.ir.program import Program

aten = torch.ops.aten

_VIEWS = (aten.view.default, aten.reshape.default, aten._unsafe_view.default, aten.expand.default)


def share(program: Program, ranks: int) -> tuple[Program, tuple[str, ...]]:
    """`program`, prelowered, dealt out over `ranks` devices; and notes on what is not. A copy is rewritten."""
    assignment = assign(program, ranks)
    builder = _Builder(program.clone(), ranks, assignment, program)
    for node in builder.program.nodes:
        builder.visit(node)
    output = builder.program.output_node
    output.args = (fx.map_arg(output.args[0], lambda n: builder.whole(n, output)),)
    builder.program.refresh()
    return builder.program, assignment.notes


class _Builder:
    """The program while it is rewritten, in program order."""

    def __init__(self, program: Program, ranks: int, assignment: Assignment, source: Program) -> None:
        self.program, self.ranks, self.store = program, ranks, source.weights
        named = {node.name: node for node in program.graph.nodes}
        self.rows = {named[node.name]: runs for node, runs in assignment.rows.items()}
        self.sinks = {named[node.name]: runs for node, runs in assignment.sinks.items()}
        self.splits: Splits = {}
        self.parts: dict[fx.Node, list[fx.Node]] = {}
        self._here: dict[tuple[fx.Node, int], fx.Node] = {}
        self._whole: dict[fx.Node, fx.Node] = {}
        self._weights: dict[str, fx.Node] = {}

    def visit(self, node: fx.Node) -> None:
        """Rewrite one call."""
        program = self.program
        product = product_of(program, node) if node in self.rows or node in self.sinks else None
        if product is not None and node in self.rows:
            self._spread(node, product)
        elif product is not None and product.x in self.splits and self.splits[product.x].runs == self.sinks[node]:
            self._sum(node, product)
        elif not any(source in self.splits for source in node.all_input_nodes):
            return
        elif (split := infer(program, node, self.splits)) is not None:
            self._each(node, split)
        elif node.target in SPLITTERS and self._known_pieces(node):
            self.splits[node] = self.splits[tensors(node)[0]]  # its pieces are made where they are taken
        elif node.target is aten.sym_size.int:
            node.args = (self.parts[node.args[0]][0], node.args[1])  # type: ignore[index]
        elif node.target in COMBINED and bool(program.arg(node, "keepdim")):
            self._combine(node)
        else:
            node.args = fx.map_arg(node.args, lambda n: self.whole(n, node))
            node.kwargs = fx.map_arg(dict(node.kwargs), lambda n: self.whole(n, node))

    # ---------------------------------------------------------------- products

    def _spread(self, node: fx.Node, product: Product) -> None:
        """Each rank some rows of the weight."""
        runs, x = self.rows[node], self.whole(product.x, node)
        parts = []
        for rank in range(self.ranks):

            def operand(argument: Any, rank: int = rank) -> Any:
                if argument is product.x:
                    return self.here(x, rank, node)
                fits = isinstance(argument, fx.Node) and product.outputs in sizes(argument)
                if not fits or not self.program.is_weight(argument):
                    return self._local(argument, rank, node)
                axis = product.axis_out if argument.meta["val"].dim() == 2 and argument is product.weight else 0
                return self.weight(argument, rank, axis, runs[rank])

            args = tuple(operand(a) for a in node.args)
            parts.append(self._call(node, node.target, args, {k: operand(v) for k, v in node.kwargs.items()}))
        self._note(node, Split(node.meta["val"].dim() - 1, runs), parts)

    def _sum(self, node: fx.Node, product: Product) -> None:
        """Each rank a part of every sum, put together on device 0."""
        runs = self.sinks[node]
        partial = [self._partial(node, product, rank, runs[rank]) for rank in range(self.ranks)]
        total = self._added(node, partial, aten.add.Tensor)
        bias = None
        if node.target is aten.linear.default:
            bias = self.program.arg(node, "bias")
        elif node.target is aten.addmm.default:
            bias = self.program.arg(node, "self")
        if bias is not None:
            total = self._call(node, aten.add.Tensor, (total, bias))
        self.program.replace(node, total)

    def _partial(self, node: fx.Node, product: Product, rank: int, runs: Runs) -> fx.Node:
        x = self.parts[product.x][rank]
        weight = self.weight(product.weight, rank, 1 - product.axis_out, runs)
        if node.target is aten.linear.default:
            return self._call(node, aten.linear.default, (x, weight))
        if node.target is aten.addmm.default:
            return self._call(node, aten.mm.default, (x, weight))
        if node.target is not ops.LINEAR:
            return self._call(node, node.target, (x, weight))
        size = product.inputs // product.groups
        groups = tuple((a // size, b // size) for a, b in runs) if product.groups > 1 else None
        scale, zero, table, steps = (self.program.arg(node, n) for n in ("scale", "zero_point", "table", "steps"))

        def parameter(argument: Any) -> Any:
            if argument is None or groups is None:
                return self._local(argument, rank, node)
            return self.weight(argument, rank, 1, groups)

        tables = (self._local(table, rank, node), self._local(steps, rank, node))
        return self._call(node, ops.LINEAR, (x, weight, parameter(scale), parameter(zero), *tables))

    def _added(self, at: fx.Node, parts: list[fx.Node], add: Callable[..., Any]) -> fx.Node:
        back = [parts[0], *(self._call(at, ops.TRANSFER, (part, 0)) for part in parts[1:])]
        return reduce(lambda a, b: self._call(at, add, (a, b)), back)

    # ---------------------------------------------------------------- between

    def _each(self, node: fx.Node, split: Split) -> None:
        """The call once a rank, on its part of what is split."""
        if node.target is operator.getitem:
            self._note(node, split, [self._piece(node, split, rank) for rank in range(self.ranks)])
            return
        parts = []
        for rank in range(self.ranks):
            args = self._arguments(node, split, rank, node.args)
            kwargs = self._arguments(node, split, rank, dict(node.kwargs))
            parts.append(self._call(node, node.target, tuple(self._sizes(node, split, rank, list(args))), kwargs))
        self._note(node, split, parts)

    def _arguments(self, node: fx.Node, split: Split, rank: int, given: Any) -> Any:
        """Arguments of one rank: parts of what is split, and of what is whole what goes with them."""

        def fit(argument: fx.Node) -> fx.Node:
            if argument in self.parts:
                return self.parts[argument][rank]
            value = argument.meta["val"]
            if not isinstance(value, Tensor):
                return argument
            axis = split.axis - node.meta["val"].dim() + value.dim()
            if axis < 0 or sizes(argument)[axis] == 1:
                return self.here(argument, rank, node)
            if self.program.is_weight(argument):
                return self.weight(argument, rank, axis, split.runs[rank])
            pieces = [self._call(node, aten.slice.Tensor, (argument, axis, a, b)) for a, b in split.runs[rank]]
            piece = pieces[0] if len(pieces) == 1 else self._call(node, aten.cat.default, (pieces, axis))
            return piece if rank == 0 else self._call(node, ops.TRANSFER, (piece, rank))

        return fx.map_arg(given, fit)

    def _sizes(self, node: fx.Node, split: Split, rank: int, args: list[Any]) -> list[Any]:
        """Arguments that say sizes or places along the split axis, as the rank has them."""
        if node.target in _VIEWS:
            wanted = list(args[1])
            wanted[split.axis] = split.count(rank)
            args[1] = wanted
        elif node.target is aten.unflatten.int:
            source, wanted = tensors(node)[0], list(args[2])
            at = int(args[1]) % source.meta["val"].dim()
            if at <= split.axis < at + len(wanted) and self.splits[source].axis == at:
                wanted[split.axis - at] = split.count(rank)
            args[2] = wanted
        elif node.target is aten.slice.Tensor:
            source = tensors(node)[0]
            before, bounds = self.splits[source], slice_bounds(self.program, node)
            if int(self.program.arg(node, "dim")) % source.meta["val"].dim() == before.axis and bounds is not None:
                start = _place(before.runs[rank], bounds[0])
                return [args[0], before.axis, start, start + split.count(rank)]
        return args

    def _known_pieces(self, node: fx.Node) -> bool:
        return all(infer(self.program, user, self.splits) is not None for user in node.users)

    def _piece(self, node: fx.Node, split: Split, rank: int) -> fx.Node:
        """A piece of what a splitter parts, as a slice."""
        parted = node.args[0]
        assert isinstance(parted, fx.Node)
        source = tensors(parted)[0]
        bounds = piece_bounds(self.program, parted, int(str(node.args[1])))
        assert bounds is not None
        axis, before = int(self.program.arg(parted, "dim")) % source.meta["val"].dim(), self.splits[source]
        start, end = bounds
        if axis == before.axis:
            start = _place(before.runs[rank], start)
            end = start + split.count(rank)
        return self._call(node, aten.slice.Tensor, (self.parts[source][rank], axis, start, end))

    def _combine(self, node: fx.Node) -> None:
        """A reduction over the split axis: one of each part, and one of those."""
        source = tensors(node)[0]
        parts = [
            self._call(node, node.target, (part, *node.args[1:]), dict(node.kwargs)) for part in self.parts[source]
        ]
        self.program.replace(node, self._added(node, parts, COMBINED[node.target]))

    # ---------------------------------------------------------------- values

    def whole(self, node: fx.Node, at: fx.Node) -> fx.Node:
        """A value on device 0, put together if it is split."""
        if node not in self.parts:
            return node
        if node not in self._whole:
            split, parts = self.splits[node], self.parts[node]
            back = [parts[0], *(self._call(at, ops.TRANSFER, (part, 0)) for part in parts[1:])]
            found = self._call(at, aten.cat.default, (back, split.axis))
            if not split.contiguous:
                order = torch.tensor([i for runs in split.runs for a, b in runs for i in range(a, b)])
                index = self.program.add_weight(f"{node.name}@order", order.argsort())
                found = self._call(at, aten.index_select.default, (found, split.axis, index))
            self._whole[node] = found
        return self._whole[node]

    def here(self, node: fx.Node, rank: int, at: fx.Node) -> fx.Node:
        """A whole value on a rank's device."""
        if self.program.is_weight(node):
            return self._copy(node, rank)
        if rank == 0:
            return node
        if (node, rank) not in self._here:
            self._here[node, rank] = self._call(at, ops.TRANSFER, (node, rank))
        return self._here[node, rank]

    def _local(self, argument: Any, rank: int, at: fx.Node) -> Any:
        tensor = isinstance(argument, fx.Node) and isinstance(argument.meta["val"], Tensor)
        return self.here(argument, rank, at) if tensor else argument

    def _copy(self, node: fx.Node, rank: int) -> fx.Node:
        """A weight that a rank has whole."""
        if rank == 0:
            return node
        key = f"{self.program.key(node)}@{rank}"
        if key not in self._weights:
            made = self.program.copy_weight(node, key)
            made.meta.update({k: v for k, v in node.meta.items() if k == CONTAINER}, **{DEVICE: rank})
            self._weights[key] = made
        return self._weights[key]

    def weight(self, node: fx.Node, rank: int, axis: int, runs: Runs) -> fx.Node:
        """A rank's part of a weight."""
        base = self.program.key(node)
        key = f"{base}@{rank}of{axis}"
        if key not in self._weights:
            shape = [int(s) for s in sizes(node)]
            shape[axis] = sum(b - a for a, b in runs)

            def compute(tensor: Tensor) -> Tensor:
                return torch.cat([tensor.narrow(axis, a, b - a) for a, b in runs], dim=axis)

            dtype = node.meta["val"].dtype
            source = Derived(self.store, (base,), compute, tuple(shape), dtype)
            made = self.program.add_weight(key, source, self.program.module_of(node))
            made.meta.update({DEVICE: rank, SLICED: (axis, runs)})
            if CONTAINER in node.meta:
                made.meta[CONTAINER] = _container(node, axis, shape)
            self._weights[key] = made
        return self._weights[key]

    def _call(self, at: fx.Node, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> fx.Node:
        return self.program.call(target, args, kwargs, before=at)

    def _note(self, node: fx.Node, split: Split, parts: list[fx.Node]) -> None:
        self.splits[node], self.parts[node] = split, parts


def _place(runs: Runs, index: int) -> int:
    """How many of a rank's indices lie before one of the whole axis."""
    return sum(max(0, min(b, index) - a) for a, b in runs)


def _container(node: fx.Node, axis: int, shape: list[int]) -> tuple[int, tuple[int, ...]]:
    """The container of a part of codes: whole rows, or whole groups of every row."""
    width, (_, groups, size) = node.meta[CONTAINER]
    if axis == 1:
        groups, size = (shape[1] // size, size) if groups > 1 else (1, shape[1])
    return (width if size * width % 8 == 0 else 8), (shape[0], groups, size)
