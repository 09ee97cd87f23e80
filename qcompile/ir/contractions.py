"""Every multiplication of an activation by a weight, found by what the graph computes and never by a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.ir.moves import axis_back, moved, rank
from qcompile.ir.program import Program
from qcompile.ir.text import target_name

aten = torch.ops.aten

Role = Literal["head", "router", "expert", "linear"]


@dataclass(frozen=True)
class Contraction:
    """One multiplication of an activation by a weight.

    Axes are counted from 0. `axis_in`, `axis_out` and `experts` are axes of the *stored* weight: the one that is summed
    over, the one that becomes output features, and the stack of experts, None for a plain matrix.
    """

    node: fx.Node  # linear, addmm, mm, matmul, bmm, baddbmm, grouped_mm
    input: fx.Node  # the activation it reads
    weight: fx.Node  # the placeholder of the weight
    axis_in: int
    axis_out: int
    experts: int | None
    path: tuple[fx.Node, ...]  # moves, casts, quantize, dequantize from the weight to the node, in program order
    operand: str  # schema name of the argument that the path ends in
    input_axis: int  # the axis of `input` that is summed over

    @property
    def op(self) -> str:
        """The operator's short name, e.g. ``linear``."""
        return short_name(self.node)


@dataclass(frozen=True)
class Obstacle:
    """A product with a weight that is no `Contraction`, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Embedding:
    """A lookup of rows of a weight ``[rows, features]`` by an integer input."""

    node: fx.Node
    weight: fx.Node
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class _Operands:
    """Which argument may be the activation and which the weight, by schema name, and their axes from the end."""

    activation: str
    weight: str
    summed: int  # axis of the weight that is summed over
    out: int  # axis of the weight that becomes output features
    activation_summed: int


def _product(left: str, right: str) -> tuple[_Operands, ...]:
    """``left @ right``: the weight may stand on either side."""
    return (_Operands(left, right, -2, -1, -1), _Operands(right, left, -1, -2, -2))


_PRODUCTS: dict[str, tuple[_Operands, ...]] = {
    "aten.linear.default": (_Operands("input", "weight", -1, -2, -1),),
    "aten.addmm.default": _product("mat1", "mat2"),
    "aten.mm.default": _product("self", "mat2"),
    "aten.matmul.default": _product("self", "other"),
    "aten.bmm.default": _product("self", "mat2"),
    "aten.baddbmm.default": _product("batch1", "batch2"),
    "aten._grouped_mm.default": _product("self", "mat2")[:1],
    "transformers.grouped_mm_fallback.default": _product("input", "weight")[:1],
}
_UNREAD = {aten.einsum.default, aten.conv1d.default, aten.convolution.default}


def find_contractions(program: Program) -> list[Contraction]:
    """Every contraction of `program`, in program order."""
    return [found for found in _survey(program) if isinstance(found, Contraction)]


def find_obstacles(program: Program) -> list[Obstacle]:
    """Products with a weight (of two axes or more) that no pass on weights can see, each with the reason."""
    return [found for found in _survey(program) if isinstance(found, Obstacle)]


def find_embeddings(program: Program) -> list[Embedding]:
    """Every lookup of rows of a weight, in program order."""
    found = []
    for node in program.calls(aten.embedding.default):
        weight, path = _origin(program, program.arg(node, "weight"))
        if program.is_weight(weight):
            found.append(Embedding(node, weight, path))
    return found


def roles(program: Program, contractions: Iterable[Contraction] | None = None) -> dict[fx.Node, Role]:
    """What each contraction is for, by its node.

    ``head``: its result reaches the output ``logits`` with no other contraction between; ``router``: it reaches a topk
    so; ``expert``: its weight is a stack of matrices; ``linear``: any other. The first that holds.
    """
    found = list(find_contractions(program) if contractions is None else contractions)
    reaches = _reaches(program, {c.node for c in found})
    table: dict[fx.Node, Role] = {}
    for c in found:
        ends = reaches[c.node]
        table[c.node] = (
            "head" if "logits" in ends else "router" if "topk" in ends else "linear" if c.experts is None else "expert"
        )
    return table


def short_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload: ``aten.linear.default`` ⟶ ``linear``."""
    parts = target_name(node.target).split(".")
    return parts[1] if len(parts) > 2 else parts[-1]


def _reaches(program: Program, barriers: set[fx.Node]) -> dict[fx.Node, frozenset[str]]:
    """Which of ``logits`` and ``topk`` each node's value gets to without passing one of `barriers`."""
    logits = program.outputs.get("logits")
    reaches: dict[fx.Node, frozenset[str]] = {}
    for node in reversed(program.graph.nodes):
        ends: set[str] = {"logits"} if node is logits else set()
        for user in node.users:
            if user.op == "output" or user in barriers:
                continue
            if user.target is aten.topk.default:
                ends.add("topk")
            ends |= reaches[user]
        reaches[node] = frozenset(ends)
    return reaches


def _survey(program: Program) -> list[Contraction | Obstacle]:
    constant = _constants(program)
    found: list[Contraction | Obstacle] = []
    for node in program.nodes:
        result: Contraction | Obstacle | None = None
        if not isinstance(node.target, OpOverload):
            continue
        if node.target in _UNREAD:
            result = _unread(node, constant)
        elif (name := str(node.target)) in _PRODUCTS:
            result = _contraction(program, node, _PRODUCTS[name], constant)
        if result is not None:
            found.append(result)
    return found


def _unread(node: fx.Node, constant: set[fx.Node]) -> Obstacle | None:
    if any(n in constant and rank(n) > 1 for n in node.all_input_nodes):
        return Obstacle(node, f"{short_name(node)} with a weight is not taken apart")
    return None


def _contraction(
    program: Program, node: fx.Node, operands: Iterable[_Operands], constant: set[fx.Node]
) -> Contraction | Obstacle | None:
    for roles_ in operands:
        activation, weight = program.arg(node, roles_.activation), program.arg(node, roles_.weight)
        if weight in constant and activation not in constant and rank(weight) > 1:
            return _resolved(program, node, activation, weight, roles_)
    return None


def _resolved(
    program: Program, node: fx.Node, activation: fx.Node, weight: fx.Node, operands: _Operands
) -> Contraction | Obstacle | None:
    """The contraction, with its axes followed back to the stored weight; an obstacle where that ends."""
    origin, path = _origin(program, weight)
    if not program.is_weight(origin):
        return Obstacle(node, f"its weight is computed ({short_name(origin)}, {origin.name}) before it is multiplied")
    if rank(origin) < 2:
        return None  # a vector times a vector, as a rotary embedding's frequencies times positions
    axes = []
    for axis, kind in ((operands.summed, "summed"), (operands.out, "output")):
        place: int | None = axis % rank(weight)
        for move in reversed(path):
            place = axis_back(program, move, place) if place is not None else None
        if place is None:
            return Obstacle(node, f"its {kind} axis is no single axis of the stored weight {program.key(origin)!r}")
        axes.append(place)
    rest = [axis for axis in range(rank(origin)) if axis not in axes]
    if axes[0] == axes[1] or len(rest) > 1:
        shape = list(origin.meta["val"].shape)
        return Obstacle(node, f"weight {program.key(origin)!r} {shape} is read as no matrix and no stack of them")
    summed = max(operands.activation_summed, -rank(activation)) % rank(activation)
    experts = rest[0] if rest else None
    return Contraction(node, activation, origin, axes[0], axes[1], experts, path, operands.weight, summed)


def _origin(program: Program, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What `node` is moved from, and the moves between, in program order."""
    path: list[fx.Node] = []
    while (source := moved(program, node)) is not None:
        path.append(node)
        node = source
    return node, tuple(reversed(path))


def _constants(program: Program) -> set[fx.Node]:
    """Nodes whose elements all come from weights: computed from weights alone, or gathered out of one."""
    constant: set[fx.Node] = set(program.weight_nodes)
    for node in program.nodes:
        source = moved(program, node)
        tensors: list[Any] = [n for n in node.all_input_nodes if isinstance(n.meta["val"], (Tensor, tuple, list))]
        if source in constant or (tensors and all(n in constant for n in tensors)):
            constant.add(node)
    return constant
