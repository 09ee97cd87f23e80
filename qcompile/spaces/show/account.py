"""An account of every space for a pass that acts on one level: what became of it, or which operator forbids it."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping

import numpy as np

from qcompile.pass_base import Entry
from qcompile.spaces.analysis import ChannelSpaces
from qcompile.spaces.show.describe import Description
from qcompile.spaces.show.group import Group, grouped
from qcompile.spaces.show.table import title
from qcompile.spaces.space import Space
from qcompile.spaces.wires import Level

_REASONS = 3
_LEFT = "left alone: "
_PIECES = "channels of its own must move alike, or weights hold it in different pieces"


def account(
    spaces: ChannelSpaces,
    found: Iterable[Description],
    level: Level,
    fates: Mapping[Space, str],
    online: Collection[str] = (),
) -> list[Entry]:
    """One line for spaces that are alike and met the same fate, in program order; together they are all spaces.

    Args:
        found: what `describe` says of `spaces`, as the program was before the pass.
        level: of the transformations that the pass applies.
        fates: what became of each space of that level.
        online: names of products and attentions whose inputs are transformed when the model runs.
    """
    words = list(fates.values())
    fate_of = np.full(spaces.wires.count, -1)
    for number, space in enumerate(fates):
        fate_of[space.wires] = number
    fate_of = fate_of[spaces.wires.roots(level)]
    lines = []
    for group in grouped(found):
        alike: dict[object, tuple[list[str], bool, list[Description]]] = {}
        for d in group.members:
            numbers = np.unique(fate_of[d.wires[d.wires >= 0]]).tolist()  # it may move with others
            others = [words[n] for n in numbers] if -1 not in numbers else []
            said = list(dict.fromkeys(fates[space] for space in d.spaces if space in fates)) or others
            form = tuple(said), tuple((r.why, r.lift) for r in d.reasons if level in r.levels)
            is_online = _is_online(d, online)
            alike.setdefault((form[:1] if said else form, is_online), (said, is_online, []))[2].append(d)
        for said, is_online, same in alike.values():
            text = "; ".join(said) or left_alone(_limits(same, level))
            where = title(Group(tuple(same))).replace("\n", ": ")
            lines.append(Entry(where, _with_online(text) if is_online else text))
    return lines


def left_alone(reason: str) -> str:
    """What becomes of a space that the pass passes over."""
    return f"{_LEFT}{reason}"


def _with_online(text: str) -> str:
    if text.startswith(_LEFT):
        return f"rotated online; not in its weights: {text.removeprefix(_LEFT)}"
    return f"{text}; rotated online too"


def _is_online(d: Description, online: Collection[str]) -> bool:
    met = {end.node for end in d.sinks} | {meeting.partition(" ")[2] for meeting in d.meets}
    return not met.isdisjoint(online)


def _limits(same: list[Description], level: Level) -> str:
    """The operators against a level, from the first of them to the last, and the pass that lifts them."""
    columns = zip(*([r for r in d.reasons if level in r.levels] for d in same), strict=True)
    lines = []
    for reasons in columns:
        first = reasons[0]
        nodes = list(dict.fromkeys((first.nodes[0], reasons[-1].nodes[-1])))
        lift = f" ({first.lift})" if first.lift and first.lift not in first.why else ""
        lines.append(f"{' … '.join(nodes)}: {first.why}{lift}")
    more = [f"and {len(lines) - _REASONS} more reasons"] if len(lines) > _REASONS else []
    return "; ".join([*lines[:_REASONS], *more]) or _PIECES
