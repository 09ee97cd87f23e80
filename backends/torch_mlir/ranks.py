"""Products that ranks share: which weights are split where, so that heads and groups stay whole.

    q, k, v ▸ attention ▸ o          gate, up ▸ act · mul ▸ down

A *sink* is a product whose input comes from other products with nothing between that needs the whole: its columns are
split, and the rows of its sources. Both are cut into equal units, as many as there can be: a unit holds whole groups of
the sink, and every operator between must be able to work on some units alone (`split`), which makes a unit of attention
a head of keys with its queries. Units are dealt out evenly, or as evenly as they go.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from qcompile.backends.torch_mlir import ops
from qcompile.backends.torch_mlir.split import RULES, Runs, Split, Splits, cut, sizes, slice_bounds, tensors
from qcompile.ir.program import Program

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Product:
    """A product with a stored weight: where its operands are, and along which axes of the weight."""

    node: fx.Node
    x: fx.Node
    weight: fx.Node
    axis_out: int
    groups: int  # scales along the summed axis; 1 for a float weight

    @property
    def outputs(self) -> int:
        return int(sizes(self.weight)[self.axis_out])

    @property
    def inputs(self) -> int:
        return int(sizes(self.weight)[1 - self.axis_out])


def product_of(program: Program, node: fx.Node) -> Product | None:
    """The product with a stored matrix that a call is."""
    target = node.target
    if target is ops.LINEAR:
        scale = program.arg(node, "scale")
        return Product(node, node.args[0], program.arg(node, "codes"), 0, int(sizes(scale)[-1]))  # type: ignore[arg-type]
    if target is ops.INTEGER_LINEAR:
        return Product(node, node.args[0], node.args[1], 0, 1)  # type: ignore[arg-type]
    x: Any
    weight: Any
    if target is aten.linear.default:
        x, weight, out = program.arg(node, "input"), program.arg(node, "weight"), 0
    elif target is aten.addmm.default and program.arg(node, "beta") == 1 and program.arg(node, "alpha") == 1:
        x, weight, out = program.arg(node, "mat1"), program.arg(node, "mat2"), 1
    elif target in (aten.mm.default, aten.matmul.default):
        x, weight, out = node.args[0], node.args[1], 1
    else:
        return None
    if not program.is_weight(weight) or program.is_weight(x) or weight.meta["val"].dim() != 2:
        return None
    return Product(node, x, weight, out, 1)


@dataclass(frozen=True)
class Assignment:
    """What was decided: the runs of rows that each rank has of a product, and the sinks that sum over ranks."""

    rows: dict[fx.Node, tuple[Runs, ...]]
    sinks: dict[fx.Node, tuple[Runs, ...]]
    notes: tuple[str, ...]


def assign(program: Program, ranks: int) -> Assignment:
    """Deal out the products of a program that was prelowered."""
    products = {node: p for node in program.nodes if (p := product_of(program, node)) is not None}
    rows: dict[fx.Node, tuple[Runs, ...]] = {}
    sinks: dict[fx.Node, tuple[Runs, ...]] = {}
    notes: list[str] = []
    for node, product in products.items():
        between, sources = _behind(product, products)
        if not sources or any(s in rows or s in sinks for s in sources):
            continue
        found = _units(program, product, [products[s] for s in sources], between, ranks)
        if found is None:
            continue
        units, found_rows, columns = found
        if units < ranks:
            notes.append(f"{program.module_of(node)}: {units} units for {ranks} ranks; some have none of it")
            continue
        rows |= found_rows
        sinks[node] = columns
    for node, product in products.items():
        if node not in rows and node not in sinks and _ends(program, node):
            rows[node] = deal([(0, product.outputs)], product.outputs, ranks)
    left = [program.module_of(n) or n.name for n in products if n not in rows and n not in sinks]
    if left:
        notes.append(f"on one device alone: {', '.join(dict.fromkeys(left))}")
    return Assignment(rows, sinks, tuple(notes))


def deal(segments: Sequence[tuple[int, int]], units: int, ranks: int) -> tuple[Runs, ...]:
    """Runs of each rank where every segment is cut into equal units.

    >>> deal([(0, 6), (6, 9)], 3, 2)
    (((0, 2), (6, 7)), ((2, 6), (7, 9)))
    """
    dealt = []
    for rank in range(ranks):
        first, last = units * rank // ranks, units * (rank + 1) // ranks
        steps = [(start, (end - start) // units) for start, end in segments]
        dealt.append(tuple((start + first * step, start + last * step) for start, step in steps))
    return tuple(dealt)


def _ends(program: Program, node: fx.Node) -> bool:
    """Whether a product's result is what the program returns: a head, whose rows may be split anywhere."""
    seen, waiting = {node}, [node]
    while waiting:
        for user in waiting.pop().users:
            if user.op == "output":
                return True
            if user in seen or RULES.get(user.target) is None or len(seen) > 8:
                return False
            seen.add(user)
            waiting.append(user)
    return False


def _behind(product: Product, products: dict[fx.Node, Product]) -> tuple[list[fx.Node], list[fx.Node]]:
    """The calls between a product and those that its input comes from, in program order, and the latter."""
    seen, waiting, sources = set[fx.Node](), [product.x], []
    while waiting and len(seen) < 400:
        node = waiting.pop()
        if node in seen or node.op != "call_function" or node.target in COMBINED:
            continue  # a reduction of a token: what else reads its operand leads on
        seen.add(node)
        if node in products:
            sources.append(node)
        elif node.target in RULES or node.target is operator.getitem or node.target in SPLITTERS:
            waiting += node.all_input_nodes
    return sorted(seen - set(sources)), sorted(sources)


SPLITTERS = (aten.split.Tensor, aten.split_with_sizes.default, aten.chunk.default)


def _units(
    program: Program, sink: Product, sources: Sequence[Product], between: Sequence[fx.Node], ranks: int
) -> tuple[int, dict[fx.Node, tuple[Runs, ...]], tuple[Runs, ...]] | None:
    """The most units that sink and sources can be cut into, with the runs of each; None where there are none."""
    segments = {s.node: segments_of(program, s) for s in sources}
    lengths = [end - start for found in segments.values() for start, end in found]
    for units in _divisors(sink.groups if sink.groups > 1 else sink.inputs):
        if units == 1:
            return None
        if any(length % units for length in lengths):
            continue
        rows = {node: deal(found, units, ranks) for node, found in segments.items()}
        split = _arrives(program, sink, rows, between)
        wanted = deal([(0, sink.inputs)], units, ranks)
        if split is not None and split.axis == sink.x.meta["val"].dim() - 1 and split.runs == wanted:
            return units, rows, wanted
    return None


def _arrives(
    program: Program, sink: Product, rows: dict[fx.Node, tuple[Runs, ...]], between: Sequence[fx.Node]
) -> Split | None:
    """How the sink's input is split where its sources are; None where something between needs the whole."""
    splits: Splits = {node: Split(node.meta["val"].dim() - 1, runs) for node, runs in rows.items()}
    for node in between:
        found = infer(program, node, splits)
        if found is None and any(s in splits for s in node.all_input_nodes) and not _harmless(program, node, splits):
            return None
        if found is not None:
            splits[node] = found
    return splits.get(sink.x)


def _harmless(program: Program, node: fx.Node, splits: Splits) -> bool:
    """Whether a call without a rule does no harm: a size, the pieces of a split, or a reduction that ranks combine."""
    if node.target in SPLITTERS or node.target is aten.sym_size.int:
        return True
    return node.target in COMBINED and bool(program.arg(node, "keepdim"))


COMBINED: dict[Any, Any] = {
    aten.amax.default: aten.maximum.default,
    aten.amin.default: aten.minimum.default,
    aten.sum.dim_IntList: aten.add.Tensor,
}
"""Reductions over the split axis: how the ranks' results are put together."""


def infer(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """How a call's result is split; None where it is whole."""
    if node.target is operator.getitem:
        return _piece(program, node, splits)
    if not any(source in splits for source in node.all_input_nodes):
        return None
    rule = RULES.get(node.target)
    return None if rule is None else rule(program, node, splits)


def _piece(program: Program, node: fx.Node, splits: Splits) -> Split | None:
    """A piece of what a splitter parts."""
    parted, index = node.args[0], int(node.args[1])  # type: ignore[arg-type]
    assert isinstance(parted, fx.Node)
    if parted.target not in SPLITTERS:
        return None
    source = tensors(parted)[0]
    if source not in splits:
        return None
    split, bounds = splits[source], piece_bounds(program, parted, index)
    if bounds is None:
        return split
    return cut(split, *bounds) if int(program.arg(parted, "dim")) % source.meta["val"].dim() == split.axis else split


def piece_bounds(program: Program, parted: fx.Node, index: int) -> tuple[int, int] | None:
    """From where to where a splitter's piece reaches, where sizes are known."""
    axis = int(program.arg(parted, "dim")) % tensors(parted)[0].meta["val"].dim()
    lengths = [dim_of(piece, axis) for piece in parted.meta["val"]]
    if any(length is None for length in lengths):
        return None
    start = sum(lengths[:index])  # type: ignore[arg-type]
    return start, start + lengths[index]  # type: ignore[operator]


def dim_of(value: Any, axis: int) -> int | None:
    """A tensor's size along an axis, where it is known."""
    size = value.shape[axis]
    return int(size) if isinstance(size, int) else None


def segments_of(program: Program, source: Product) -> list[tuple[int, int]]:
    """The runs of a product's outputs that are used apart: of a fused projection, q, k and v."""
    found = sorted(set(_used_apart(program, source.node)))
    edges = [0, *(end for _, end in found)]
    whole = found and edges[-1] == source.outputs and all(s == e for (s, _), e in zip(found, edges, strict=False))
    return found if whole else [(0, source.outputs)]


def _used_apart(program: Program, node: fx.Node) -> Iterator[tuple[int, int]]:
    last = node.meta["val"].dim() - 1
    for user in node.users:
        if user.target in SPLITTERS and int(program.arg(user, "dim")) % (last + 1) == last:
            pieces = [piece_bounds(program, user, i) for i in range(len(user.meta["val"]))]
            yield from (piece for piece in pieces if piece is not None)
        elif user.target is aten.slice.Tensor and int(program.arg(user, "dim")) % (last + 1) == last:
            bounds = slice_bounds(program, user)
            if bounds is not None:
                yield bounds
        elif user.target in _THROUGH and _last(user) == _last(node):
            yield from _used_apart(program, user)


_THROUGH = {aten.view.default, aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.to.dtype}
"""What stands between a product and those who use it: a view of its rows, scales, a bias."""


def _last(node: fx.Node) -> int | None:
    return dim_of(node.meta["val"], -1)


def _divisors(number: int) -> list[int]:
    """The divisors of a number, the largest first."""
    return [d for d in range(number, 0, -1) if number % d == 0]
