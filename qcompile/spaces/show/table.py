"""Spaces as a table for people and as plain data for machines."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

from rich.table import Table
from rich.text import Text

from qcompile.spaces.show.describe import NAMES, Description, End
from qcompile.spaces.show.group import Group
from qcompile.spaces.show.names import braced
from qcompile.spaces.wires import Level

_REASONS = 3
_LEGEND = "← source: W ← T·W    → sink: W ← W·T⁻¹    γ gain: takes a diagonal    = read by something else too"


def table(groups: Iterable[Group]) -> Table:
    """One row a group."""
    result = Table("space", "may act", "weights", "limited by", title="channel spaces", caption=_LEGEND)
    for column, ratio in zip(result.columns, (26, 17, 34, 34), strict=True):
        column.ratio, column.overflow = ratio, "fold"
    result.expand = True
    for group in groups:
        result.add_row(*map(Text, (title(group), may_act(group.first), weights(group), limits(group.first))))
        result.add_section()
    return result


def title(group: Group) -> str:
    """Where it is, its kind, how many are alike, its width."""
    times = "" if len(group.members) == 1 else f" × {len(group.members)}"
    return f"{group.where}\n{group.first.kind}{times}, {width(group.first)}"


def width(d: Description) -> str:
    """``4096``, ``4096 = 32 × 128``, and how often a weight holds each channel."""
    blocks = max(d.blocks, key=lambda b: len(b.widths), default=None)
    text = str(d.width)
    if blocks is not None and len(blocks.widths) > 1 and blocks.level is not Level.DIAGONAL:
        text += f" = {len(blocks.widths)} × {blocks.widths[0]}" if len(set(blocks.widths)) == 1 else " in parts"
    copies = max((e.copies for e in d.ends), default=1)
    return text if copies == 1 else f"{text}, ≤ {copies} copies"


def may_act(d: Description) -> str:
    """The largest groups that may act: of those within each other, the largest."""
    have = {b.level: b for b in d.blocks}
    if Level.LINEAR in have:
        return str(have[Level.LINEAR])
    larger = [have[level] for level in (Level.ORTHOGONAL, Level.DIAGONAL) if level in have]
    if Level.ORTHOGONAL not in have and Level.PERMUTATION in have:
        larger.append(have[Level.PERMUTATION])
    return "\n".join(map(str, larger)) or "nothing"


def weights(group: Group) -> str:
    """Sources, gains, sinks and ties, a line each."""
    return "\n".join(f"{sign} {braced(names)}" for sign, names in group.lines())


def limits(d: Description) -> str:
    """What forbids the next larger groups, the shortest reasons first; and the pass that lifts it or goes around it."""
    reasons, wanted = d.limiting, d.next_levels
    lines = []
    for reason in reasons[:_REASONS]:
        against = "/".join(NAMES[level] for level in reason.levels if level in wanted) if d.levels else ""
        lift = f" ({reason.lift})" if reason.lift and reason.lift not in reason.why else ""
        lines.append(f"{against}{': ' if against else ''}{reason}{lift}")
    if len(reasons) > _REASONS:
        lines.append(f"and {len(reasons) - _REASONS} more")
    if wanted and not reasons:
        lines.append("the weights that it meets hold it in different pieces")
    if d.around is not None:
        lines.append(f"online: {d.around}")
    return "\n".join(lines)


def as_data(groups: Iterable[Group]) -> list[dict[str, Any]]:
    """Every space with all that is known of it, and the row that it is in."""
    return [
        {"row": i, "where": group.where, **_description(d)} for i, group in enumerate(groups) for d in group.members
    ]


def _description(d: Description) -> dict[str, Any]:
    return {
        "kind": d.kind,
        "width": d.width,
        "admits": [NAMES[level] for level in d.levels],
        "blocks": {NAMES[b.level]: list(b.widths) for b in d.blocks},
        "sources": [_end(e) for e in d.sources],
        "absorbers": [_end(e) for e in d.absorbers],
        "sinks": [_end(e) for e in d.sinks],
        "meets": list(d.meets),
        "ties": list(d.ties),
        "online": d.around,
        "limits": [{**asdict(r), "levels": [NAMES[level] for level in r.levels]} for r in d.reasons],
    }


def _end(e: End) -> dict[str, Any]:
    return asdict(e)
