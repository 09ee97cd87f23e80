"""Draw a program with its channel spaces in colour, as SVG or as a page that points spaces out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from xml.sax.saxutils import escape

from qcompile.spaces.analysis import ChannelSpaces
from qcompile.spaces.show.describe import Description
from qcompile.spaces.show.graph import Box, Drawing, Edge, drawing
from qcompile.spaces.show.group import Group, grouped
from qcompile.spaces.show.place import Placed, placed
from qcompile.spaces.show.table import limits, may_act, title, weights
from qcompile.spaces.wires import Level

PALETTE = (
    *("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9"),
    *("#8c564b", "#9467bd", "#17a2b8", "#a3a500", "#e75480", "#2f6f3e"),
    *("#1a237e", "#7a1f1f", "#66a61e", "#b07aa1", "#c49c00", "#4d4d9f"),
)
GREY = "#9aa0a6"
PITCH, HEIGHT, MARGIN, TOP = 62, 34, 40, 46
_DASHES = {Level.DIAGONAL: "7 4", Level.PERMUTATION: "1.5 4"}
_FILLS = {"norm": "#fff8dc", "attention": "#eef2ff", "function": "#fdecea", "end": "#f1f3f4", "output": "#f1f3f4"}
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#202124}.small{font-size:10px;fill:#5f6368}"
    ".box{stroke:#5f6368;fill:#fff}.edge{fill:none;stroke-linecap:round}.dim{opacity:.13}"
)
_SCRIPT = """
const all = [...document.querySelectorAll('[data-row]')];
for (const one of all) {
  if (one.dataset.row === '-1') continue;
  one.addEventListener('mouseenter', () => {
    const row = one.dataset.row.split(' ')[0];
    for (const other of all) other.classList.toggle('dim', !other.dataset.row.split(' ').includes(row));
  });
  one.addEventListener('mouseleave', () => { for (const other of all) other.classList.remove('dim'); });
}
"""


def draw(spaces: ChannelSpaces, found: Sequence[Description], page: bool = False) -> str:
    """An SVG of the program, or an HTML page that has it in it and shows one space at a time under the pointer."""
    groups = grouped(found)
    sketch = drawing(spaces, groups)
    svg = _Svg(
        sketch, groups, placed([_width(b) for b in sketch.boxes], [(e.start, e.end) for e in sketch.edges])
    ).text()
    if not page:
        return svg
    head = '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>channel spaces</title></head>'
    return f'{head}<body style="margin:0">{svg}<script>{_SCRIPT}</script></body></html>\n'


def _width(box: Box) -> float:
    return 28.0 if _round(box) else max(58.0, 7.0 * len(box.label) + 22, 5.6 * len(box.detail) + 18)


def _round(box: Box) -> bool:
    return box.kind == "sum" and len(box.label) == 1


@dataclass(frozen=True)
class _Svg:
    sketch: Drawing
    groups: Sequence[Group]
    at: Placed

    def text(self) -> str:
        right = max((x + _width(b) / 2 for x, b in zip(self.at.x, self.sketch.boxes, strict=True)), default=0)
        bends = [x for points in self.at.bends for x, _ in points]
        right = max([right, *bends])
        legend = self._legend(right + 2 * MARGIN + 30)
        rows = max(self.at.row, default=0) + 1
        height = max(rows * PITCH + TOP + MARGIN, 24 * len(self.groups) * 2 + 200)
        width = right + 2 * MARGIN + 30 + 470
        parts = [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:.0f} {height:.0f}" width="{width:.0f}" '
            f'height="{height:.0f}"><style>{_STYLE}</style><rect width="100%" height="100%" fill="#fff"/>',
            *(self._frame(label, inside) for label, inside in self.sketch.frames),
            *(self._edge(i, edge) for i, edge in enumerate(self.sketch.edges)),
            *(self._box(i, box) for i, box in enumerate(self.sketch.boxes)),
            legend,
            "</svg>\n",
        ]
        return "\n".join(parts)

    def colour(self, row: int) -> str:
        """A row's colour; grey where nothing may act."""
        admitting = [i for i, group in enumerate(self.groups) if group.first.levels]
        return PALETTE[admitting.index(row) % len(PALETTE)] if row in admitting else GREY

    def stroke(self, row: int) -> str:
        """How a line shows what may act: whole for mixing, dashes for a diagonal, dots for a permutation."""
        levels = self.groups[row].first.levels if row >= 0 else ()
        mixes = Level.ORTHOGONAL in levels or Level.LINEAR in levels
        dash = (
            None if mixes or not levels else _DASHES[Level.DIAGONAL if Level.DIAGONAL in levels else Level.PERMUTATION]
        )
        dashed = f' stroke-dasharray="{dash}"' if dash else ""
        return f'stroke="{self.colour(row)}" stroke-width="{3 if levels else 1.2}"{dashed}'

    def _centre(self, i: int) -> tuple[float, float]:
        return self.at.x[i] + MARGIN, self.at.row[i] * PITCH + TOP + HEIGHT / 2

    def _ports(self, edge: Edge) -> tuple[float, float]:
        """How far from the middle an edge leaves and arrives: in the order in which the other ends stand."""
        shifts = []
        for end in (edge.start, edge.end):
            leaves = end == edge.start
            same = [e for e in self.sketch.edges if (e.start if leaves else e.end) == end]
            order = sorted(same, key=lambda e: (self._toward(e, end), e.start, e.end))
            span = min(0.6 * _width(self.sketch.boxes[end]), 22.0 * (len(order) - 1))
            shifts.append(0.0 if len(order) == 1 else span * (order.index(edge) / (len(order) - 1) - 0.5))
        return shifts[0], shifts[1]

    def _toward(self, edge: Edge, end: int) -> float:
        """Where the next point of an edge is, seen from one of its ends."""
        points = self.at.bends[self.sketch.edges.index(edge)]
        if not points:
            return self.at.x[edge.end if end == edge.start else edge.start]
        return points[0 if end == edge.start else -1][0]

    def _edge(self, i: int, edge: Edge) -> str:
        leave, arrive = self._ports(edge)
        (x0, y0), (x1, y1) = self._centre(edge.start), self._centre(edge.end)
        points = [(x0 + leave, y0 + self._half(edge.start))]
        for x, row in self.at.bends[i]:
            points += [(x + MARGIN, row * PITCH + TOP - 2), (x + MARGIN, row * PITCH + TOP + HEIGHT + 2)]
        points.append((x1 + arrive, y1 - self._half(edge.end)))
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}"
        for (ax, ay), (bx, by) in pairwise(points):
            middle = (ay + by) / 2
            path += f"C{ax:.1f} {middle:.1f} {bx:.1f} {middle:.1f} {bx:.1f} {by:.1f}"
        tip = "\n".join([self._tip(edge.row), *(f"stopped by {s}" for s in edge.stops)])
        mark = ""
        if edge.stops:
            (ax, ay), (bx, by) = points[-2], points[-1]
            at = f'cx="{(ax + bx) / 2:.1f}" cy="{(ay + by) / 2:.1f}"'
            mark = f'<circle {at} r="4" fill="#fff" stroke="#b3261e" stroke-width="2"/>'
        line = f'<path class="edge" d="{path}" {self.stroke(edge.row)}/>'
        return f'<g data-row="{edge.row}"><title>{escape(tip)}</title>{line}{mark}</g>'

    def _half(self, i: int) -> float:
        return 14.0 if _round(self.sketch.boxes[i]) else HEIGHT / 2

    def _box(self, i: int, box: Box) -> str:
        (x, y), w = self._centre(i), _width(box)
        left, top = x - w / 2, y - HEIGHT / 2
        fill = f' style="fill:{_FILLS[box.kind]}"' if box.kind in _FILLS else ""
        tip = f"{box.module or box.label}\n{box.node}\nreads: {self._name(box.before)}\nmakes: {self._name(box.behind)}"
        if _round(box):
            shape = f'<circle class="box" cx="{x:.1f}" cy="{y:.1f}" r="14"/>'
        else:
            radius = 4 if box.kind in ("product", "embedding") else HEIGHT / 2
            dash = ' stroke-dasharray="3 3"' if box.kind == "cache" else ""
            place = f'x="{left:.1f}" y="{top:.1f}" width="{w:.1f}" height="{HEIGHT}"'
            shape = f'<rect class="box" {place} rx="{radius}"{fill}{dash}/>'
        bars = ""
        if box.kind in ("product", "embedding"):
            sides = [(top, box.before)] if box.kind == "product" else []
            for edge, row in (*sides, (top + HEIGHT - 5, box.behind)):
                bars += f'<rect x="{left:.1f}" y="{edge:.1f}" width="{w:.1f}" height="5" fill="{self.colour(row)}"/>'
        up = 1 if box.detail else -4
        label = f'<text x="{x:.1f}" y="{y - up:.1f}" text-anchor="middle">{escape(box.label)}</text>'
        if box.detail:
            label += (
                f'<text class="small" x="{x:.1f}" y="{y + 10:.1f}" text-anchor="middle">{escape(box.detail)}</text>'
            )
        return f'<g data-row="{box.behind} {box.before}"><title>{escape(tip)}</title>{shape}{bars}{label}</g>'

    def _frame(self, label: str, inside: list[int]) -> str:
        boxes = [(self._centre(i), _width(self.sketch.boxes[i])) for i in inside]
        passing = [
            x + MARGIN
            for points, edge in zip(self.at.bends, self.sketch.edges, strict=True)
            for x, _ in points
            if edge.start in inside and edge.end in inside
        ]
        left = min([c[0] - w / 2 for c, w in boxes] + passing) - 14
        right = max([c[0] + w / 2 for c, w in boxes] + passing) + 14
        top = min(c[1] for c, _ in boxes) - HEIGHT / 2 - 11
        bottom = max(c[1] for c, _ in boxes) + HEIGHT / 2 + 11
        return (
            f'<rect x="{left:.1f}" y="{top:.1f}" width="{right - left:.1f}" height="{bottom - top:.1f}" rx="10" '
            f'fill="#f8f9fa" stroke="#dadce0"/><text x="{left + 12:.1f}" y="{bottom - 9:.1f}">{escape(label)}</text>'
        )

    def _name(self, row: int) -> str:
        return title(self.groups[row]).replace("\n", ": ") if row >= 0 else "no space"

    def _tip(self, row: int) -> str:
        if row < 0:
            return "no space"
        group = self.groups[row]
        stops = limits(group.first)
        return f"{title(group)}\nmay act: {may_act(group.first)}\n{weights(group)}" + (
            f"\nlimited by: {stops}" if stops else ""
        )

    def _legend(self, left: float) -> str:
        """Every row with its colour, then what the lines mean."""
        lines, y = (
            [f'<text x="{left:.0f}" y="{TOP:.0f}" font-weight="bold">spaces, and what may act on them</text>'],
            TOP + 26,
        )
        for row, group in enumerate(self.groups):
            where, what = title(group).split("\n")
            act = may_act(group.first).replace("\n", "; ")
            lines.append(
                f'<g data-row="{row}"><title>{escape(self._tip(row))}</title>'
                f'<path class="edge" d="M{left:.0f} {y - 4}h34" {self.stroke(row)}/>'
                f'<text x="{left + 44:.0f}" y="{y}">{escape(_cut(where))}</text>'
                f'<text class="small" x="{left + 44:.0f}" y="{y + 13}">{escape(_cut(f"{what}: {act}", 80))}</text></g>'
            )
            y += 36
        y += 10
        for row_text in (
            "whole line: orthogonal or any T; dashes: a diagonal; dots: a permutation; thin grey: nothing",
            "bars of a weight: above the channels that it reads, below those that it makes",
            "red circle: an operator on the way forbids something; point at it to see which",
        ):
            lines.append(f'<text class="small" x="{left:.0f}" y="{y}">{escape(row_text)}</text>')
            y += 16
        return "\n".join(lines)


def _cut(text: str, most: int = 58) -> str:
    return text if len(text) <= most else f"{text[: most - 1]}…"
