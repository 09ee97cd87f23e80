"""Descriptions that differ only in the number of their layer, as one row."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from qcompile.spaces.show.describe import Description, End
from qcompile.spaces.show.names import common, merged, plain, template, within
from qcompile.spaces.show.reasons import Reason


@dataclass(frozen=True)
class Group:
    """Descriptions that are alike."""

    members: tuple[Description, ...]

    @property
    def first(self) -> Description:
        """What is true of each."""
        return self.members[0]

    @property
    def where(self) -> str:
        """The module that all its weights are in; of a stream, where it starts and ends."""
        d = self.first
        if d.kind == "stream":
            ends = [plain(e.weight) for e in (d.sources[0], d.sinks[-1] if d.sinks else d.sources[-1])]
            return " … ".join(dict.fromkeys(ends))
        names = self.names(lambda d: [e for e in d.ends if e.role not in ("bias", "constant")] or d.ends)
        if len(names) == 1:
            return names[0].rpartition(".")[0] or names[0]
        return common(names) or f"{names[0]} … {names[-1]}"

    def names(self, ends: Callable[[Description], Iterable[End]]) -> list[str]:
        """Weights of all members, with ranges for what differs."""
        return merged(plain(end.weight) for member in self.members for end in ends(member))

    def lines(self) -> list[tuple[str, list[str]]]:
        """Sources, gains, sinks and ties, each with its sign, as seen from `where`; a bias beside its weight."""
        biases = {n.removesuffix(".bias"): n for n in self.names(lambda d: [e for e in d.ends if e.role == "bias"])}
        result: list[tuple[str, list[str]]] = []
        for sign, role in (("←", "sources"), ("γ", "absorbers")):
            names = self.names(lambda d, r=role: [e for e in getattr(d, r) if e.role != "bias"])  # type: ignore[misc]
            result.append((sign, [f"{n} + bias" if biases.pop(n, None) else n for n in names]))
        result[0][1].extend(biases.values())
        result += [("→", self.names(lambda d: d.sinks)), ("=", self.ties)]
        return [(sign, [within(n, self.where) for n in names]) for sign, names in result if names]

    @property
    def ties(self) -> list[str]:
        """Weights that something else reads too."""
        return merged(plain(key) for member in self.members for key in member.ties)

    def modules(self, reason: Reason) -> list[str]:
        """Where a reason of the first member stands in all of them."""
        key = _reason(reason)
        return merged(plain(m) for d in self.members for r in d.reasons if _reason(r) == key for m in r.modules)


def grouped(descriptions: Iterable[Description], every: bool = False) -> list[Group]:
    """Groups in the order of their first members; with `every`, each description by itself."""
    found: dict[object, list[Description]] = {}
    for i, description in enumerate(descriptions):
        found.setdefault(i if every else _form(description), []).append(description)
    return [Group(tuple(same)) for same in found.values()]


def _form(d: Description) -> tuple[object, ...]:
    ends = tuple(
        (e.role, template(e.weight), e.axis, e.copies, e.inverse) for e in (*d.sources, *d.absorbers, *d.sinks)
    )
    return d.kind, d.blocks, d.width, ends, tuple(map(template, d.ties)), tuple(_reason(r) for r in d.limiting)


def _reason(r: Reason) -> tuple[object, ...]:
    return r.levels, r.operator, r.why, r.lift, tuple(dict.fromkeys(map(template, r.modules)))
