"""One walk over a program that gives every tensor its wires and records how operators relate them."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
from torch import Tensor, fx

from qcompile.ir.contractions import Contraction, Embedding, Obstacle, survey
from qcompile.ir.program import Program
from qcompile.ir.types import Dim, dim_expr
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout, Spread, plain
from qcompile.spaces.wires import EVERY, MIXING, Level, Wires

Kind = Literal["source", "sink", "norm", "query", "key", "state", "output"]

_WHOLE = 1 << 22  # elements of a constant that each get a wire; of a larger one those along its last axis do


@dataclass(frozen=True, eq=False)
class Use:
    """Where wires meet a weight or an operator that passes need to know of.

    source: ``W ← T·W`` along `axis`; sink: ``W ← W·T⁻¹`` along `axis`. A weight is seen in the shape `view`.
    """

    kind: Kind
    node: fx.Node
    ids: Ids  # one axis
    weight: fx.Node | None = None
    axis: int = 0
    view: tuple[int, ...] | None = None
    levels: tuple[Level, ...] = EVERY


@dataclass(frozen=True, eq=False)
class Triple:
    """out = a · b, element by element: whose scale is whose is settled when all others are known."""

    a: Ids
    b: Ids
    out: Ids
    event: int


Rule = Callable[["Walk", fx.Node], "Layout | list[Layout]"]


@dataclass
class Walk:
    """State of the walk; rules read layouts by `of`, relate wires through `wires`, and return the result's layout."""

    program: Program
    wires: Wires
    layouts: dict[fx.Node, Layout | list[Layout]] = field(default_factory=dict)
    uses: list[Use] = field(default_factory=list)
    triples: list[Triple] = field(default_factory=list)
    contractions: dict[fx.Node, Contraction] = field(default_factory=dict)
    embeddings: dict[fx.Node, Embedding] = field(default_factory=dict)
    obstacles: dict[fx.Node, str] = field(default_factory=dict)
    matrices: set[fx.Node] = field(default_factory=set)  # weights of products and lookups, and what is moved from them
    constants: set[fx.Node] = field(default_factory=set)  # nodes whose wires come from a weight alone
    shared: dict[tuple[fx.Node, str, int], Ids] = field(
        default_factory=dict
    )  # wires of a weight's axis, by its first use

    def __post_init__(self) -> None:
        for found in survey(self.program):
            if isinstance(found, Contraction):
                self.contractions[found.node] = found
            elif isinstance(found, Embedding):
                self.embeddings[found.node] = found
            elif isinstance(found, Obstacle):
                self.obstacles[found.node] = found.reason
        found_products: list[Contraction | Embedding] = [*self.contractions.values(), *self.embeddings.values()]
        for product in found_products:
            self.matrices |= {product.weight, *product.path}

    # ------------------------------------------------------------------ reading

    def of(self, argument: Any) -> Layout:
        """The layout of a tensor argument."""
        assert isinstance(argument, fx.Node)
        found = self.layouts.get(argument)
        if found is None:
            found = self._constant(argument) if self.program.is_weight(argument) else plain(sizes(argument))
            self.layouts[argument] = found
        assert isinstance(found, Layout)
        return found

    def wired(self, node: fx.Node) -> list[fx.Node]:
        """The tensor arguments of a call that have wires; matrices of products are seen to when the walk is over."""
        tensors = [n for n in node.all_input_nodes if isinstance(n.meta.get("val"), Tensor) and n not in self.matrices]
        return [n for n in tensors if self.of(n).has_wires]

    def _constant(self, node: fx.Node) -> Layout:
        """Wires for the elements of a weight that is no matrix of a product: a gain, a bias, a table of positions."""
        shape = [int(s) for s in node.meta["val"].shape]
        layout = plain(shape)
        count = math.prod(shape)
        if count <= 1 or not node.meta["val"].dtype.is_floating_point:
            return layout
        self.constants.add(node)
        if count <= _WHOLE:
            vectors = np.broadcast_to(np.arange(count // shape[-1]).reshape([*shape[:-1], 1]), shape)
            ids = self.wires.fresh(vectors)
            self.use(Use("source", node, ids.ravel(), node, 0, (count,)))
            return layout.with_ids(ids)
        ids = self.wires.fresh(np.zeros(shape[-1], np.int64))
        self.use(Use("source", node, ids, node, len(shape) - 1))
        return layout.with_ids(ids.reshape([1] * (len(shape) - 1) + [-1]))

    # ------------------------------------------------------------------ relating

    def use(self, use: Use) -> None:
        """Record a use; its wires may be mixed with each other as far as it goes, with no others."""
        if use.ids.size == 0 or not (use.ids >= 0).any():
            return
        self.uses.append(use)
        self.wires.together(use.levels, use.ids, self.wires.event(use.node, use.kind))

    def stop(self, layout: Layout, node: fx.Node, reason: str, levels: tuple[Level, ...] = EVERY) -> None:
        """Nothing of `levels` may act on these wires, because of `node`."""
        if layout.has_wires:
            self.wires.limit(levels, layout.ids, self.wires.event(node, reason))

    def only(self, layout: Layout, node: fx.Node, levels: tuple[Level, ...] = MIXING) -> None:
        """`node` changes these wires, and may change them alone: they are not mixed with others of their vector."""
        if layout.has_wires:
            self.wires.together(levels, layout.ids, self.wires.event(node, "changes a part of the channels"))

    def barrier(self, node: fx.Node, reason: str) -> Layout | list[Layout]:
        """Nothing may act on what `node` reads; its results have no wires."""
        for source in self.wired(node):
            self.stop(self.of(source), node, reason)
        return no_wires(node)

    def follow(self, layout: Layout, node: fx.Node) -> Layout:
        """New wires that move as those of `layout` do: other values, from other positions or summed over them."""
        if not layout.has_wires:
            return layout
        old = layout.ids
        new = self.wires.beside(old)
        self.wires.join(old, new)
        self.wires.same_copy(old, new)
        self.wires.together(MIXING, old, self.wires.event(node, "moves whole vectors"))
        return layout.with_ids(new)

    def copies(self, ids: Ids, rows: Ids) -> Ids:
        """New wires that move as `ids` do, for other vectors in each of `rows`."""
        wired = ids >= 0
        vectors = np.where(wired, self.wires.instance[ids] * (rows.max() + 1) + rows, -1)
        new = np.where(wired, self.wires.fresh(vectors), -1)
        self.wires.join(ids, new)
        self.wires.same_copy(ids, new)
        return new

    def spread(self, node: fx.Node) -> Spread:
        """What knows the vectors of several tokens apart that stand side by side on an axis."""

        def of(ids: Ids, rows: Ids) -> Ids:
            self.wires.together(MIXING, ids, self.wires.event(node, "vectors side by side"))
            return self.copies(ids, rows)

        return of

    def collapsed(self, ids: Ids, place: int, node: fx.Node) -> Ids:
        """Wires along an axis of `ids` move alike: it has length 1 then."""
        first = ids.take([0], place)
        self.wires.join(first, ids)
        rows = np.arange(ids.shape[place]).reshape([-1 if i == place else 1 for i in range(ids.ndim)])
        self.wires.together(MIXING, ids, self.wires.event(node, "the same for all tokens"), rows)
        return np.asarray(first)

    def rows(self, layout: Layout, node: fx.Node, reason: str, rows: Ids, levels: tuple[Level, ...] = MIXING) -> None:
        """Wires may be mixed within their row only; where each is alone in its row, not at all."""
        if not layout.has_wires:
            return
        event = self.wires.event(node, reason)
        rows = np.broadcast_to(rows, layout.ids.shape)
        wired = layout.ids >= 0
        _, counts = np.unique(rows[wired], return_counts=True)
        if (counts <= 1).all():
            self.wires.limit(levels, layout.ids, event)
        else:
            self.wires.together(levels, layout.ids, event, rows)

    def share(self, weight: fx.Node, kind: Kind, axis: int, ids: Ids) -> None:
        """A weight that several products read: its axis moves in one way only."""
        first = self.shared.setdefault((weight, kind, axis), ids)
        if first is not ids:
            self.wires.join(first, ids)


def sizes(node: fx.Node) -> list[Dim]:
    """The shape of a node's value; that of a number is empty."""
    value = node.meta["val"]
    return [dim_expr(d) for d in value.shape] if isinstance(value, Tensor) else []


def no_wires(node: fx.Node) -> Layout | list[Layout]:
    """Layouts without wires for the result of a call."""
    value = node.meta["val"]
    if isinstance(value, (tuple, list)):
        return [plain([dim_expr(d) for d in v.shape]) if isinstance(v, Tensor) else plain([]) for v in value]
    return plain(sizes(node))
