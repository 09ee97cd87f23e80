"""Places for boxes of a graph that is nearly a chain: rows by longest path, few crossings, straight long edges.

The steps are those of Sugiyama, Tagawa and Toda (1981): rows, dummies where an edge crosses a row, an order in each row
by barycentres, then coordinates. Those are least-squares: each row is as near to its neighbours' means as gaps allow.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

GAP, SWEEPS, _DUMMY = 26.0, 24, 8.0


@dataclass(frozen=True)
class Placed:
    """Centres: x in pixels, the row's number; for each edge the points between its ends."""

    x: list[float]
    row: list[int]
    bends: list[list[tuple[float, int]]]


def placed(widths: Sequence[float], edges: Sequence[tuple[int, int]]) -> Placed:
    """Lay out boxes whose numbers are in topological order."""
    count = len(widths)
    rows = _rows(count, edges)
    sizes, weights = list(widths), [1.0] * count
    chains: list[list[int]] = []
    for start, end in edges:
        chain = [start]
        for row in range(rows[start] + 1, rows[end]):
            chain.append(len(sizes))
            sizes.append(_DUMMY)
            weights.append(6.0)
            rows.append(row)
        chains.append([*chain, end])
    up: dict[int, list[int]] = defaultdict(list)
    down: dict[int, list[int]] = defaultdict(list)
    for chain in chains:
        for a, b in pairwise(chain):
            down[a].append(b)
            up[b].append(a)
    layers: list[list[int]] = [[] for _ in range(max(rows, default=-1) + 1)]
    for node in sorted(range(len(sizes)), key=lambda n: (rows[n], n >= count, n)):
        layers[rows[node]].append(node)
    _order(layers, up, down)
    x = _coordinates(layers, up, down, sizes, weights)
    return Placed(x[:count], rows[:count], [[(x[n], rows[n]) for n in chain[1:-1]] for chain in chains])


def _rows(count: int, edges: Sequence[tuple[int, int]]) -> list[int]:
    """The length of the longest path to each box; what nothing leads to stands just above its reader."""
    rows = [0] * count
    led = {end for _, end in edges}
    for start, end in sorted(edges, key=lambda e: e[0]):
        rows[end] = max(rows[end], rows[start] + 1)
    for box in range(count):
        readers = [rows[end] for start, end in edges if start == box]
        if box not in led and readers:
            rows[box] = max(min(readers) - 1, 0)
    return rows


def _order(layers: list[list[int]], up: dict[int, list[int]], down: dict[int, list[int]]) -> None:
    """Sort each row by where its neighbours stand, downwards and upwards in turn."""
    for sweep in range(SWEEPS):
        near, step = (up, 1) if sweep % 2 == 0 else (down, -1)
        ordered = layers[::step]
        for beside, layer in pairwise(ordered):
            place = {node: i for i, node in enumerate(beside)}
            own = {node: i for i, node in enumerate(layer)}
            key = {n: (_mean([place[m] for m in near[n] if m in place], own[n]), own[n]) for n in layer}
            layer.sort(key=key.__getitem__)


def _mean(values: list[int], otherwise: float) -> float:
    return sum(values) / len(values) if values else otherwise


def _coordinates(
    layers: list[list[int]],
    up: dict[int, list[int]],
    down: dict[int, list[int]],
    sizes: list[float],
    weights: list[float],
) -> list[float]:
    x = [0.0] * len(sizes)
    for layer in layers:
        left = 0.0
        for node in layer:
            x[node] = left + sizes[node] / 2
            left += sizes[node] + GAP
    for sweep in range(SWEEPS):
        for layer in layers if sweep % 2 == 0 else layers[::-1]:
            wanted = []
            for n in layer:
                near = [*up[n], *down[n]] if sweep >= SWEEPS // 2 else up[n] if sweep % 2 == 0 else down[n]
                pull = [(x[m], weights[m] * weights[n]) for m in near]
                wanted.append(sum(p * w for p, w in pull) / sum(w for _, w in pull) if pull else x[n])
            gaps = [0.0]
            for a, b in pairwise(layer):
                gaps.append(gaps[-1] + (sizes[a] + sizes[b]) / 2 + GAP)
            fitted = _isotonic([w - g for w, g in zip(wanted, gaps, strict=True)], [weights[n] for n in layer])
            for node, value, gap in zip(layer, fitted, gaps, strict=True):
                x[node] = value + gap
    _straighten(layers, down, sizes, x)
    left = min((x[n] - sizes[n] / 2 for n in range(len(sizes))), default=0.0)
    return [value - left for value in x]


def _straighten(layers: list[list[int]], down: dict[int, list[int]], sizes: list[float], x: list[float]) -> None:
    """Long edges that run along a side of every row that they cross: one straight line each, outermost first."""
    boxes = [size > _DUMMY for size in sizes]
    for side, outermost in ((-1, max), (0, min)):
        ends = {layer[side] for layer in layers if layer and not boxes[layer[side]]}
        starts = [n for n in sorted(ends) if not any(n in down[m] for m in ends)]
        for start in starts:
            chain = [start]
            while (below := down[chain[-1]][0]) in ends:
                chain.append(below)
            if boxes[below]:
                place = outermost(x[n] for n in chain)
                for n in chain:
                    x[n] = place


def _isotonic(values: list[float], weights: list[float]) -> list[float]:
    """The nearest values, in weighted least squares, that do not fall (pool adjacent violators)."""
    pools: list[tuple[float, float, int]] = []
    for value, weight in zip(values, weights, strict=True):
        pool = (value, weight, 1)
        while pools and pools[-1][0] > pool[0]:
            mean, heavy, many = pools.pop()
            total = heavy + pool[1]
            pool = ((mean * heavy + pool[0] * pool[1]) / total, total, many + pool[2])
        pools.append(pool)
    return [mean for mean, _, many in pools for _ in range(many)]
