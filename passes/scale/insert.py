"""Scale channels where no weight can take the factor up.

    y = linear(x, W)      ⟶      y = linear(mul(x, 1/s), W·diag(s))

Exact. Products that read one tensor share one multiplication.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, find_contractions
from qcompile.ir.edits import AlongAxis
from qcompile.ir.moves import readers
from qcompile.ir.program import Program
from qcompile.pass_base import Report
from qcompile.spaces.apply import part_weight

aten = torch.ops.aten


@dataclass(frozen=True, eq=False)
class Waiting:
    """Products that read one tensor, and the factors s of its channels, float64 ``[channels]``."""

    nodes: tuple[fx.Node, ...]
    factors: Tensor


def insert_all(program: Program, waiting: Sequence[Waiting], report: Report) -> None:
    """Put a multiplication in front of each group of products."""
    products = {c.node: c for c in find_contractions(program)}
    for item in waiting:
        mine = [products[node] for node in item.nodes]
        scaled = insert_factors(program, mine, item.factors, report)
        for node in item.nodes:
            report.rewrote(node, f"its input is multiplied by {program.key(scaled.args[1])!r} when the model runs")  # type: ignore[arg-type]


def obstacle(product: Contraction) -> str | None:
    """Why no multiplication can be put in front of a product, or None."""
    if product.groups > 1:
        return f"it convolves {product.groups} groups of channels: no multiplication is put in front of it"
    if product.input.meta["val"].shape[product.input_axis] != product.weight.meta["val"].shape[product.axis_in]:
        return "it reads a part of a weight"
    if any("qcompile." in str(node.target) for node in (*product.path, product.input)):
        return "it is quantized already"
    return None


def insert_factors(program: Program, products: list[Contraction], factors: Tensor, report: Report) -> fx.Node:
    """Divide the tensor that `products` read by `factors` (float64 ``[channels]``), and let their weights undo it.

    Returns the multiplication. The factors are rounded to the tensor's dtype first, so that both sides have the same.
    """
    x, axis = products[0].input, products[0].input_axis
    order = {node: i for i, node in enumerate(program.graph.nodes)}
    first = min(products, key=lambda c: order[c.node])
    inverse = factors.reciprocal().to(x.meta["val"].dtype)
    shape = [1] * (x.meta["val"].ndim - axis)
    shape[0] = -1
    key, module = _free_key(program, first), program.module_of(first.node)
    vector = program.add_weight(key, inverse.reshape(shape), module=module)
    scaled = program.call(aten.mul.Tensor, (x, vector), before=first.node, module=module)
    exact = inverse.double().reciprocal()
    for weight in dict.fromkeys(c.weight for c in products):
        mine = [c for c in products if c.weight is weight]
        for axis_in in {c.axis_in for c in mine}:
            _edit(program, [c for c in mine if c.axis_in == axis_in], exact, report)
    for c in products:
        c.node.replace_input_with(x, scaled)
    return scaled


def _edit(program: Program, mine: list[Contraction], factors: Tensor, report: Report) -> None:
    """Multiply the columns of one weight, for these readers only."""
    weight, nodes = mine[0].weight, [c.node for c in mine]
    if any(reader not in nodes for reader in readers(weight)):
        weight = part_weight(program, weight, nodes, report)
    program.edit_weight(weight, AlongAxis(mine[0].axis_in, lambda vectors: vectors * factors.to(vectors)))


def _free_key(program: Program, product: Contraction) -> str:
    stem = f"{program.key(product.weight).removesuffix('.weight')}.input_factor"
    name, number = stem, 2
    while name in program.weights:
        name, number = f"{stem}_{number}", number + 1
    return name
