"""Which rule of a recipe decides at which place."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import fx

from qcompile.errors import RecipeError, nearest
from qcompile.ir.contractions import Contraction, Embedding, Role, short_name
from qcompile.ir.program import Program
from qcompile.ir.text import target_name
from qcompile.recipe.model import Rule


@dataclass(frozen=True)
class Place:
    """A contraction, or an embedding, as rules see it."""

    reader: Contraction | Embedding
    names: tuple[str, ...]  # of the module, of the weight, of the weight without ".weight"
    operators: tuple[str, ...]
    layer: int | None
    role: Role


def places(program: Program, readers: Sequence[Contraction | Embedding], table: Mapping[fx.Node, Role]) -> list[Place]:
    """What rules can select by, for each contraction (its role is in `table`) and each embedding."""
    found = []
    for reader in readers:
        node = reader.node
        module, key = program.module_of(node), program.key(reader.weight)
        names = tuple(dict.fromkeys(n for n in (module, key, key.removesuffix(".weight")) if n))
        operators = (short_name(node), target_name(node.target))
        found.append(Place(reader, names, operators, layer_of(names[0]), table.get(node, "embedding")))
    return found


def layer_of(name: str) -> int | None:
    """The first component of a dotted name that is a number."""
    return next((int(part) for part in name.split(".") if part.isdigit()), None)


def decide(rules: Sequence[Rule], found: Sequence[Place]) -> list[int | None]:
    """For each place the index of the first rule that matches it, or None.

    Raises RecipeError for a rule that is not `optional` and decides nowhere.
    """
    tests = [_Test(rule, index) for index, rule in enumerate(rules)]
    hits = [[test.matches(place) for place in found] for test in tests]
    first = [next((i for i in range(len(tests)) if hits[i][j]), None) for j in range(len(found))]
    for index, rule in enumerate(rules):
        if not rule.optional and index not in first:
            raise RecipeError(_why_nowhere(tests[index], found, first, hits[index]))
    return first


class _Test:
    """One rule, compiled."""

    def __init__(self, rule: Rule, index: int) -> None:
        self.rule, self.index = rule, index
        self.match = None if rule.match is None else glob(rule.match, index)
        self.layers = None if rule.layers is None else _layers(rule.layers, index)
        self.operators = None if rule.operator is None else [part.strip() for part in rule.operator.split("|")]

    def matches(self, place: Place) -> bool:
        return (
            self.names(place)
            and (self.operators is None or any(op in self.operators for op in place.operators))
            and (self.layers is None or place.layer in self.layers)
            and (self.rule.role is None or self.rule.role == place.role)
        )

    def names(self, place: Place) -> bool:
        return self.match is None or any(self.match.fullmatch(name) for name in place.names)


def glob(pattern: str, index: int) -> re.Pattern[str]:
    """A glob as a regular expression: ``*`` and ``**`` any run of characters, ``?`` one, ``{a,b}`` either."""
    text, depth = "", 0
    for piece in re.findall(r"\*+|.", pattern):
        if piece in "{}":
            depth += 1 if piece == "{" else -1
            text += "(?:" if piece == "{" else ")"
        elif piece == "," and depth:
            text += "|"
        else:
            text += ".*" if piece[0] == "*" else "." if piece == "?" else re.escape(piece)
        if depth not in (0, 1):
            break
    if depth:
        raise RecipeError(f"rules.{index}: match {pattern!r} has braces that do not pair; write {{0,31}}, not nested")
    return re.compile(text)


def _layers(text: str | int, index: int) -> set[int]:
    layers: set[int] = set()
    for part in str(text).split(","):
        ends = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if ends is None:
            raise RecipeError(f"rules.{index}: layers {str(text)!r} is not written like 0-3,31")
        layers |= set(range(int(ends[1]), int(ends[2] or ends[1]) + 1))
    return layers


def _why_nowhere(test: _Test, found: Sequence[Place], first: Sequence[int | None], hits: Sequence[bool]) -> str:
    head = f"rules.{test.index}"
    if any(hits):
        earlier = sorted({i for i, hit in zip(first, hits, strict=True) if hit and i is not None})
        taken = f"rules {', '.join(map(str, earlier))} before it match all its places"
        return f"{head} decides nowhere: {taken}; move it up, or drop it"
    return f"{head} matches nothing: {_missing(test, found)}; correct it, or say optional: true"


def _missing(test: _Test, found: Sequence[Place]) -> str:
    """The first selector that holds nowhere, and what there is."""
    rule = test.rule
    named = [place for place in found if test.names(place)]
    if not named:
        close = nearest(str(rule.match), [name for place in found for name in place.names])
        return f"no module or weight is called {rule.match!r}{close}"
    if test.operators is not None and not any(op in test.operators for place in found for op in place.operators):
        seen = sorted({place.operators[0] for place in found})
        return f"no product or lookup is {rule.operator!r}, they are {', '.join(seen)}"
    if test.layers is not None and not any(place.layer in test.layers for place in named):
        layers = sorted({place.layer for place in named if place.layer is not None})
        return f"layers {rule.layers} are none of {', '.join(map(str, layers)) or 'its places, which have no layer'}"
    if rule.role is not None and not any(place.role == rule.role for place in named):
        kinds = sorted({place.role for place in named})
        return f"no place there has role {rule.role!r}, they are {', '.join(kinds)}"
    return "its selectors hold at no place together"
