"""Every multiplication of an activation by a weight, found by what the graph computes and never by a name."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, fx
from torch._ops import OpOverload

from qcompile.ir.moves import axis_back, moved, rank
from qcompile.ir.products import Product, read_product
from qcompile.ir.program import Program
from qcompile.ir.text import target_name

aten = torch.ops.aten

Role = Literal["head", "router", "expert", "convolution", "linear", "embedding"]


@dataclass(frozen=True)
class Contraction:
    """One multiplication of an activation by a weight.

    Axes are counted from 0. `axis_in`, `axis_out`, `experts` and `kernel` are axes of the *stored* weight: the one that
    is summed over, the one that becomes output features, the stack of experts (None for a plain matrix), and those that
    a convolution's window slides along (empty for all else). With `groups` > 1 the output features come in that many
    runs of equal length, each of which reads its own run of the input's features: `axis_in` then has a group's share.
    """

    node: fx.Node  # linear, addmm, mm, matmul, bmm, baddbmm, grouped_mm, einsum, conv1d, conv2d, conv3d, convolution
    input: fx.Node  # the activation it reads
    weight: fx.Node  # the placeholder of the weight
    axis_in: int
    axis_out: int
    experts: int | None
    path: tuple[fx.Node, ...]  # moves, casts, quantize, dequantize from the weight to the node, in program order
    operand: str  # schema name of the argument that the path ends in, or of the list that holds it
    input_axis: int  # the axis of `input` that is summed over
    output_axis: int  # the axis of the result that is output features
    kernel: tuple[int, ...] = ()
    groups: int = 1

    @property
    def op(self) -> str:
        """The operator's short name, e.g. ``linear``."""
        return short_name(self.node)

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of the stored weight that ``[out, in]`` stand for in a recipe's spec."""
        return self.axis_out, self.axis_in


@dataclass(frozen=True)
class Obstacle:
    """A product with a weight that is no `Contraction`, or a lookup in one that is no `Embedding`, and why."""

    node: fx.Node
    reason: str


@dataclass(frozen=True)
class Embedding:
    """A lookup of rows of a weight ``[rows, features]`` by an integer input; axes are those of the stored weight."""

    node: fx.Node
    weight: fx.Node
    path: tuple[fx.Node, ...]
    axis_rows: int = 0
    axis_features: int = 1
    operand: str = "weight"

    @property
    def op(self) -> str:
        """The operator's short name."""
        return short_name(self.node)

    @property
    def axes(self) -> tuple[int, int]:
        """Axes of the stored weight that ``[rows, features]`` stand for in a recipe's spec."""
        return self.axis_rows, self.axis_features

    @property
    def experts(self) -> None:
        """A table is no stack."""
        return None


Found = Contraction | Embedding | Obstacle


def find_contractions(program: Program) -> list[Contraction]:
    """Every contraction of `program`, in program order."""
    return [found for found in survey(program) if isinstance(found, Contraction)]


def find_obstacles(program: Program) -> list[Obstacle]:
    """Products with a weight (of two axes or more), and lookups, that no pass on weights can see; each with the reason.

    >>> text = "def main(x: f32[2, 4], *, w: f32[6, 4]):\\n    m = aten.mul.Tensor(w, 2.0)\\n"
    >>> text += "    y = aten.linear.default(x, m)\\n    return {'y': y}"
    >>> find_obstacles(Program.parse(text))[0].reason
    'its weight is computed (mul, m) before it is multiplied'
    """
    return [found for found in survey(program) if isinstance(found, Obstacle)]


def find_embeddings(program: Program) -> list[Embedding]:
    """Every lookup of rows of a weight, in program order."""
    return [found for found in survey(program) if isinstance(found, Embedding)]


def survey(program: Program) -> list[Found]:
    """Every contraction, embedding and obstacle, in program order."""
    constant = constants(program)
    found: list[Found | None] = []
    for node in program.nodes:
        if node.target is aten.embedding.default:
            found.append(_embedding(program, node, constant))
        elif isinstance(node.target, OpOverload):
            product = read_product(program, node, constant)
            if isinstance(product, str):
                found.append(Obstacle(node, product))
            elif product is not None:
                found.append(_contraction(program, node, product))
    return [f for f in found if f is not None]


def roles(program: Program, contractions: Iterable[Contraction] | None = None) -> dict[fx.Node, Role]:
    """What each contraction is for, by its node.

    ``head``: its result reaches the output ``logits`` with no other contraction between; ``router``: it reaches a topk
    so; ``expert``: its weight is a stack of matrices; ``convolution``: a window slides; ``linear``: any other. The
    first that holds.
    """
    found = list(find_contractions(program) if contractions is None else contractions)
    reaches = _reaches(program, {c.node for c in found})
    return {c.node: _role(c, reaches[c.node]) for c in found}


def short_name(node: fx.Node) -> str:
    """The operator's name without namespace and overload: ``aten.linear.default`` ⟶ ``linear``."""
    parts = target_name(node.target).split(".")
    return parts[1] if len(parts) > 2 else parts[-1]


def _role(c: Contraction, ends: frozenset[str]) -> Role:
    if "logits" in ends:
        return "head"
    if "topk" in ends:
        return "router"
    if c.experts is not None:
        return "expert"
    return "convolution" if c.kernel else "linear"


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


def _embedding(program: Program, node: fx.Node, constant: set[fx.Node]) -> Embedding | Obstacle | None:
    table = program.arg(node, "weight")
    if table not in constant:
        return None
    origin, path = _origin(program, table)
    if not program.is_weight(origin):
        return Obstacle(node, f"its table is computed ({short_name(origin)}, {origin.name}) before rows are looked up")
    rows, features = _stored_axes(program, table, path)
    if rows is None or features is None or rows == features or rank(origin) > 2:
        shape = list(origin.meta["val"].shape)
        return Obstacle(node, f"weight {program.key(origin)!r} {shape} is read as no table of rows and features")
    return Embedding(node, origin, path, rows, features)


def _contraction(program: Program, node: fx.Node, product: Product) -> Contraction | Obstacle | None:
    """The contraction, with its axes followed back to the stored weight; an obstacle where that ends."""
    origin, path = _origin(program, product.weight)
    if not program.is_weight(origin):
        return Obstacle(node, f"its weight is computed ({short_name(origin)}, {origin.name}) before it is multiplied")
    if rank(origin) < 2:
        return None  # a vector times a vector, as a rotary embedding's frequencies times positions
    name, shape = repr(program.key(origin)), list(origin.meta["val"].shape)
    stored = _stored_axes(program, product.weight, path)
    used = (product.summed, product.out, *product.kernel)
    kinds = ("summed", "output", *("window" for _ in product.kernel))
    places: list[int] = []
    for axis, kind in zip(used, kinds, strict=True):
        if (place := stored[axis]) is None:
            return Obstacle(node, f"its {kind} axis is no single axis of the stored weight {name}")
        places.append(place)
    if split := [place for axis, place in enumerate(stored) if axis not in used and place in places]:
        return Obstacle(node, f"weight {name} {shape} is read as a stack of parts of its axis {split[0]}")
    rest = [axis for axis in range(rank(origin)) if axis not in places]
    if len(set(places)) < len(places) or len(rest) > 1:
        return Obstacle(node, f"weight {name} {shape} is read as no matrix and no stack of them")
    return Contraction(
        node,
        product.activation,
        origin,
        axis_in=places[0],
        axis_out=places[1],
        experts=rest[0] if rest else None,
        path=path,
        operand=product.operand,
        input_axis=product.activation_summed,
        output_axis=product.result_out,
        kernel=tuple(places[2:]),
        groups=product.groups,
    )


def _stored_axes(program: Program, read: fx.Node, path: tuple[fx.Node, ...]) -> list[int | None]:
    """For each axis of what is read, the axis of the stored weight that it is; None where it is no single one."""
    stored: list[int | None] = []
    for axis in range(rank(read)):
        place: int | None = axis
        for move in reversed(path):
            place = axis_back(program, move, place) if place is not None else None
        stored.append(place)
    return stored


def _origin(program: Program, node: fx.Node) -> tuple[fx.Node, tuple[fx.Node, ...]]:
    """What `node` is moved from, and the moves between, in program order."""
    path: list[fx.Node] = []
    while (source := moved(program, node)) is not None:
        path.append(node)
        node = source
    return node, tuple(reversed(path))


def constants(program: Program) -> set[fx.Node]:
    """Nodes whose elements all come from weights: computed from weights alone, or gathered out of one."""
    constant: set[fx.Node] = set(program.weight_nodes)
    for node in program.nodes:
        source = moved(program, node)
        tensors: list[Any] = [n for n in node.all_input_nodes if isinstance(n.meta["val"], (Tensor, tuple, list))]
        if source in constant or (tensors and all(n in constant for n in tensors)):
            constant.add(node)
    return constant
