"""A program as a drawing has it: products, norms, attention, sums; what only moves elements is an edge; a layer that
comes again and again is drawn once.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx

from qcompile.ir.contractions import short_name
from qcompile.ir.state import state_pairs
from qcompile.spaces.analysis import ChannelSpaces
from qcompile.spaces.forest import Ids
from qcompile.spaces.layout import Layout
from qcompile.spaces.show.group import Group
from qcompile.spaces.show.names import plain, ranges, template
from qcompile.spaces.wires import Level

aten = torch.ops.aten
_BLOCK = re.compile(r"^(.*?)(?:^|(?<=\.))(\d+)(?=\.|$)")
_SUMS = (aten.add.Tensor, aten.sub.Tensor, aten.mul.Tensor, aten.div.Tensor, aten.where.self)
_SOFT = (aten.scaled_dot_product_attention.default,)


@dataclass(frozen=True)
class Box:
    """Something drawn. `before` and `behind` are rows of the table: the spaces of what it reads and makes."""

    kind: str  # "product", "embedding", "norm", "attention", "sum", "function", "end", "output" or "cache"
    label: str
    detail: str
    node: str
    module: str
    before: int = -1
    behind: int = -1


@dataclass(frozen=True)
class Edge:
    """From box to box, in the space of what arrives; `stops` are operators on the way that forbid something."""

    start: int
    end: int
    row: int
    stops: tuple[str, ...] = ()


@dataclass(frozen=True)
class Drawing:
    """Boxes in program order, the edges between them, and the runs of layers that are drawn once."""

    boxes: list[Box]
    edges: list[Edge]
    frames: list[tuple[str, list[int]]]


def drawing(spaces: ChannelSpaces, groups: Sequence[Group]) -> Drawing:
    """What to draw of a program, its spaces numbered as rows of `groups`."""
    found = _Sketch(spaces, _rows(spaces, groups))
    found.walk()
    return _once(found.boxes, sorted(set(found.edges), key=lambda e: (e.start, e.end)))


def _rows(spaces: ChannelSpaces, groups: Sequence[Group]) -> Ids:
    """For each wire the row of its space, the one that admits most."""
    wires = spaces.wires
    rows = np.full(wires.count, -1)
    members = [(i, d) for i, group in enumerate(groups) for d in group.members]
    for level in Level:
        table = np.full(wires.count, -1)
        for i, d in members:
            for space in d.spaces:
                if space.level is level:
                    table[space.wires] = i
            if level is Level.PERMUTATION and not d.levels:
                table[wires.forest(level).find(d.wires[d.wires >= 0])] = i
        own = table[wires.roots(level)]
        rows = np.where(own >= 0, own, rows)
    return rows


class _Sketch:
    """One walk: which boxes each value comes from, past all that only moves elements."""

    def __init__(self, spaces: ChannelSpaces, rows: Ids) -> None:
        self.spaces, self.program, self.rows = spaces, spaces.program, rows
        self.boxes: list[Box] = []
        self.edges: list[Edge] = []
        self.above: dict[
            fx.Node, dict[int, tuple[str, ...]]
        ] = {}  # boxes that a value comes from, what stops on the way
        self.stops: dict[fx.Node, str] = {}
        for level in (Level.DIAGONAL, Level.ORTHOGONAL):
            for _, event in spaces.wires.restricted(level):
                limit = spaces.wires.events[event]
                self.stops.setdefault(limit.node, str(limit))
        self.kinds: dict[fx.Node, str] = {}
        for use in spaces.uses:
            if use.weight is not None and use.node is not use.weight:
                embedding = use.node.target is aten.embedding.default
                self.kinds[use.node] = "embedding" if embedding else "product"
            elif use.kind in ("norm", "query", "key", "state"):
                self.kinds[use.node] = {"norm": "norm", "state": "cache"}.get(use.kind, "attention")

    def walk(self) -> None:
        """Draw every node that has a say."""
        for node in self.program.graph.nodes:
            if self.program.is_weight(node):
                continue
            kind = self._kind(node)
            if kind is not None:
                self._draw(node, kind)
            elif node.op == "call_function":
                self._pass(node)
        paired = {pair.present for pair in state_pairs(self.program)}
        for name, value in self.program.outputs.items():
            if name not in paired and isinstance(value, fx.Node) and self.above.get(value):
                self.boxes.append(Box("output", name, "", value.name, "", self._row(value)))
                self._connect([value], len(self.boxes) - 1)

    def _kind(self, node: fx.Node) -> str | None:
        """How a node is drawn; None for what is part of an edge."""
        if node in self.kinds:
            return self.kinds[node]
        if node.op != "call_function" or not isinstance(node.meta.get("val"), Tensor):
            return None
        above = self._inputs(node)
        boxes = {box for n in above for box in self.above[n]}
        if not boxes:
            return None
        if node.target in _SUMS and len(above) > 1 and len(boxes) > 1:
            return "sum"
        wired = [n for n in above if self._wired(n)]
        if wired and not self._wired(node):
            return "end" if node in self.stops else None
        return "function" if node in self.stops and len(node.all_input_nodes) == 1 else None

    def _draw(self, node: fx.Node, kind: str) -> None:
        inputs = self._inputs(node)
        read = next((self._row(n) for n in inputs), -1)
        self.boxes.append(Box(kind, *self._text(node, kind), node.name, self._module(node), read, self._row(node)))
        self._connect(inputs, len(self.boxes) - 1)
        if kind != "end":
            self.above[node] = {len(self.boxes) - 1: ()}

    def _module(self, node: fx.Node) -> str:
        reader = next((u for u in node.users if self.program.module_of(u)), node) if node.op == "placeholder" else node
        return self.program.module_of(reader)

    def _text(self, node: fx.Node, kind: str) -> tuple[str, str]:
        if kind == "cache":
            return "cache", ""
        if kind in ("product", "embedding"):
            weight = next(u.weight for u in self.spaces.uses if u.node is node and u.weight is not None)
            shape = " × ".join(map(str, weight.meta["val"].shape))
            parts = plain(self.program.key(weight)).split(".")
            return ".".join(parts[-2:] if parts[-1].isdigit() else parts[-1:]), shape
        if kind == "norm":
            gain = (
                self.program.arg(node, "weight")
                if node.target in (aten.rms_norm.default, aten.layer_norm.default)
                else 0
            )
            return short_name(node) + (" · γ" if isinstance(gain, fx.Node) else ""), ""
        if kind == "attention":
            return ("attention" if node.target in _SOFT else "q · k"), ""
        signs = {"add": "+", "sub": "−", "mul": "×", "div": "÷"}
        return signs.get(short_name(node), short_name(node)), ""

    def _pass(self, node: fx.Node) -> None:
        """A node that is no box hands on what it comes from."""
        handed: dict[int, tuple[str, ...]] = {}
        inputs = self._inputs(node)
        stop = (self.stops[node],) if node in self.stops and inputs else ()
        for n in inputs:
            for box, stops in self.above[n].items():
                if self._wired(node) or self.boxes[box].kind == "attention":
                    handed[box] = tuple(dict.fromkeys((*handed.get(box, ()), *stops, *stop)))
        if handed:
            self.above[node] = handed

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        return [n for n in node.all_input_nodes if self.above.get(n)]

    def _connect(self, inputs: Iterable[fx.Node], end: int) -> None:
        for n in inputs:
            self.edges += [Edge(start, end, self._row(n), stops) for start, stops in self.above[n].items()]

    def _layouts(self, node: fx.Node) -> list[Layout]:
        found = self.spaces.layouts.get(node)
        return found if isinstance(found, list) else [found] if found is not None else []

    def _wired(self, node: fx.Node) -> bool:
        return any(layout.has_wires for layout in self._layouts(node))

    def _row(self, node: fx.Node) -> int:
        """The row that most wires of a value are in."""
        ids = [layout.ids[layout.ids >= 0].ravel() for layout in self._layouts(node)]
        rows = self.rows[np.concatenate(ids)] if ids else np.empty(0, np.int64)
        rows = rows[rows >= 0]
        return int(np.bincount(rows).argmax()) if rows.size else -1


def _once(boxes: list[Box], edges: list[Edge]) -> Drawing:
    """Runs of layers that look alike as their first, in a frame."""
    layers: dict[tuple[str, int], list[int]] = defaultdict(list)
    for i, box in enumerate(boxes):
        if found := _BLOCK.match(box.module):
            layers[found[1], int(found[2])].append(i)
    home = {i: key for key, inside in layers.items() for i in inside}
    place = {i: k for inside in layers.values() for k, i in enumerate(inside)}
    inner: dict[tuple[str, int], list[tuple[int, ...]]] = defaultdict(list)
    for e in edges:
        if e.start in home and home[e.start] == home.get(e.end):
            inner[home[e.start]].append((place[e.start], place[e.end], e.row))
    runs: list[list[tuple[str, int]]] = []
    looks: list[object] = []
    for key in sorted(layers):
        alike = [replace(boxes[i], node="", module=template(boxes[i].module)) for i in layers[key]]
        look = (key[0], alike, sorted(inner[key]))
        if runs and looks[-1] == look and runs[-1][-1] == (key[0], key[1] - 1):
            runs[-1].append(key)
        else:
            runs.append([key])
            looks.append(look)
    run_of = {key: run for run in runs for key in run}
    target = {i: layers[run_of[home[i]][0]][place[i]] if i in home else i for i in range(len(boxes))}
    kept = sorted(set(target.values()))
    new = {old: i for i, old in enumerate(kept)}
    links = {
        replace(e, start=new[target[e.start]], end=new[target[e.end]])
        for e in edges
        if _shown(home.get(e.start), home.get(e.end), run_of)
    }
    frames = [
        (
            f"{plain(run[0][0] + '.').strip('.')} {ranges(n for _, n in run)}  × {len(run)}",
            [new[i] for i in layers[run[0]]],
        )
        for run in runs
        if len(run) > 1
    ]
    ordered = sorted(links, key=lambda e: (e.start, e.end, e.row, e.stops))
    unique = {(e.start, e.end, e.row): e for e in ordered}
    return Drawing([boxes[i] for i in kept], list(unique.values()), frames)


def _shown(
    start: tuple[str, int] | None, end: tuple[str, int] | None, run_of: dict[tuple[str, int], list[tuple[str, int]]]
) -> bool:
    """Whether an edge is of a layer that is drawn, enters the first of a run, or leaves the last."""
    if start is not None and start == end:
        return run_of[start][0] == start
    if start is not None and end is not None and run_of[start] is run_of[end]:
        return False
    leaves = start is None or run_of[start][-1] == start
    return leaves and (end is None or run_of[end][0] == end)
